"""Sites: the kinds of activation that a patch can replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from patchsweep.errors import SiteError

Unit = Literal["head", "kv_head", "neuron"]


@dataclass(frozen=True)
class Site:
    """One kind of activation, found in every block unless `layered` is false."""

    name: str
    hook: str  # TransformerLens hook name inside the block (or whole, if not layered)
    unit: Unit | None  # what a patch can be narrowed to besides a position
    reach: Literal["token", "suffix"]  # what patching token p changes inside its own block
    in_attention: bool  # lives inside the attention function, at no module's border
    layered: bool = True
    from_token: bool = False  # at layer 0 it depends on the token and its position alone
    named: bool = False  # a hook point given by its full name: the hooked runner's

    @property
    def is_pattern(self) -> bool:
        """Whether its activation is `[pair, head, dest, src]`; a patch replaces whole rows
        `[dest]` of it, or single cells of `pattern_cell`."""
        return self.hook == "attn.hook_pattern"

    def hook_name(self, layer: int) -> str:
        """The full TransformerLens hook name at `layer`."""
        return f"blocks.{layer}.{self.hook}" if self.layered else self.hook


def _site(
    name: str,
    hook: str,
    unit: Unit | None = None,
    reach: Literal["token", "suffix"] = "token",
    *,
    in_attention: bool = False,
    layered: bool = True,
    from_token: bool = False,
) -> Site:
    return Site(name, hook, unit, reach, in_attention, layered, from_token)


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        _site("resid_pre", "hook_resid_pre", reach="suffix", from_token=True),
        _site("resid_mid", "hook_resid_mid"),
        _site("resid_post", "hook_resid_post"),
        _site("attn_out", "hook_attn_out"),
        _site("mlp_out", "hook_mlp_out"),
        _site("z", "attn.hook_z", "head"),
        _site("q", "attn.hook_q", "head", from_token=True),
        _site("k", "attn.hook_k", "kv_head", "suffix", from_token=True),
        _site("v", "attn.hook_v", "kv_head", "suffix", from_token=True),
        _site("rot_q", "attn.hook_rot_q", "head", in_attention=True, from_token=True),
        _site("rot_k", "attn.hook_rot_k", "kv_head", "suffix", in_attention=True, from_token=True),
        _site("pattern", "attn.hook_pattern", "head", in_attention=True),
        _site("pattern_cell", "attn.hook_pattern", "head", in_attention=True),
        _site("result", "attn.hook_result", "head"),
        _site("mlp_post", "mlp.hook_post", "neuron"),
        _site("embed", "hook_embed", reach="suffix", layered=False, from_token=True),
    )
}


def get_sites(names: str | Sequence[str]) -> tuple[Site, ...]:
    """The sites called `names`, in order.

    A name with `hook_` in it is a TransformerLens hook point, such as `blocks.3.mlp.hook_pre`,
    or `blocks.{layer}.mlp.hook_pre` for that of every block. Its activations must be
    `[batch, pos, ...]`. A patch changes what the hook point hands on, as a hook does that returns a
    new tensor; at resid_pre, resid_mid, resid_post and embed, and at the hook points of those
    names, it replaces the residual stream for every reader.

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
    """A site of one hook point, or of the same one in every block."""
    _, found, inside = name.partition("blocks.{layer}.")
    return Site(
        name=re.sub(r"\W+", "_", name).strip("_"),  # the name of its variable in the store
        hook=inside if found else name,
        unit=None,
        reach="suffix",
        in_attention=False,
        layered=bool(found),
        named=True,
    )
