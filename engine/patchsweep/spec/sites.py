"""Sites: the kinds of activation that a patch can replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from patchsweep.errors import SiteError

Unit = Literal["head", "kv_head", "neuron"]


@dataclass(frozen=True)
class Site:
    """One kind of activation, with everything the engine must know about it.

    To add a site, add an entry to `SITES`.
    """

    name: str
    hook: str  # TransformerLens hook name inside the block; the full name if not layered
    unit: Unit | None = None  # what a patch can be narrowed to besides a position
    reach: Literal["token", "suffix"] = "token"  # what patching token p changes inside its block
    layered: bool = True  # found in every block; False: once
    in_attention: bool = False  # lives inside the attention function, at no module's border
    in_stream: bool = False  # written into the residual stream, at a block's input
    shift: int = 0  # written at the input of the block this many blocks after the site's own
    written_as: str | None = None  # site that is patched instead; its values determine this one's
    projected: bool = False  # output of an attention input projection, which may be fused (QKV)
    side: Literal["query", "key", "value"] | None = None  # its role in attention
    cells: bool = False  # a patch replaces one cell (dest, src) of the pattern, not rows `[dest]`
    from_token: bool = False  # at layer 0 it depends on the token and its position alone
    named: bool = False  # a hook point given by its full name; only the hooked runner runs it

    @property
    def is_pattern(self) -> bool:
        """Whether the activation is an attention pattern `[pair, head, dest, src]`.

        A patch replaces whole rows `[dest]` of it, or single cells if the site has `cells`.
        """
        return self.hook == "attn.hook_pattern"

    def hook_name(self, layer: int) -> str:
        """Return the full TransformerLens hook name at `layer`."""
        return f"blocks.{layer}.{self.hook}" if self.layered else self.hook


_STREAM: dict[str, Any] = {"in_stream": True, "reach": "suffix"}
_QUERY: dict[str, Any] = {"unit": "head", "side": "query", "from_token": True}
_KEY: dict[str, Any] = {"unit": "kv_head", "side": "key", "reach": "suffix", "from_token": True}
_VALUE: dict[str, Any] = _KEY | {"side": "value"}
_PATTERN: dict[str, Any] = {"hook": "attn.hook_pattern", "unit": "head", "in_attention": True}

SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("resid_pre", "hook_resid_pre", **_STREAM, from_token=True),
        Site("resid_mid", "hook_resid_mid"),
        Site("resid_post", "hook_resid_post", in_stream=True, shift=1),
        Site("attn_out", "hook_attn_out"),
        Site("mlp_out", "hook_mlp_out"),
        Site("z", "attn.hook_z", "head"),
        Site("q", "attn.hook_q", **_QUERY, projected=True),
        Site("k", "attn.hook_k", **_KEY, projected=True),
        Site("v", "attn.hook_v", **_VALUE, projected=True),
        Site("rot_q", "attn.hook_rot_q", **_QUERY, in_attention=True),
        Site("rot_k", "attn.hook_rot_k", **_KEY, in_attention=True),
        Site("pattern", **_PATTERN),
        Site("pattern_cell", **_PATTERN, cells=True),
        Site("result", "attn.hook_result", "head", written_as="z"),  # z times W_O
        Site("mlp_post", "mlp.hook_post", "neuron"),
        Site("embed", "hook_embed", **_STREAM, layered=False, from_token=True),
    )
}


def get_sites(names: str | Sequence[str]) -> tuple[Site, ...]:
    """Return the sites called `names`, in order.

    A name with `hook_` in it is a TransformerLens hook point: `blocks.3.mlp.hook_pre`, or
    `blocks.{layer}.mlp.hook_pre` for the same one in every block. Its activations must be
    `[batch, pos, ...]`. A patch changes the output of the hook point, as a hook that returns a new
    tensor does. At resid_pre, resid_mid, resid_post and embed, and at the hook points of those
    names, a patch replaces the residual stream for every later module.

    Raises:
        SiteError: a name is unknown or given twice, or there is none.
    """
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise SiteError(f"sites={names!r} must be a site's name or a list of names, such as ['z']")
    if not names:
        raise SiteError("sites is empty; name at least one, such as resid_pre or z")
    unknown = [name for name in names if name not in SITES and "hook_" not in name]
    if unknown:
        raise SiteError(f"site {unknown[0]!r} is not known; use one of {', '.join(SITES)}")
    if len(set(names)) < len(names):
        raise SiteError(f"sites={list(names)} names a site twice; name each once")
    return tuple(SITES[name] if name in SITES else _named(name) for name in names)


def _named(name: str) -> Site:
    """Return the site of one hook point, or of the same hook point in every block."""
    _, separator, inside = name.partition("blocks.{layer}.")
    return Site(
        name=re.sub(r"\W+", "_", name).strip("_"),  # the name of its variable in the store
        hook=inside if separator else name,
        reach="suffix",
        layered=bool(separator),
        named=True,
    )
