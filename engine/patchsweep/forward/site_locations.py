"""Site locations in the plain modules: a module's input or output, or the attention function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge
from transformers.pytorch_utils import Conv1D

from patchsweep.forward.unwrapped import HookLocation, Unsupported, UnwrappedModel
from patchsweep.spec.sites import SITES, Site


@dataclass(frozen=True)
class SiteLocation:
    """The location of a site in the plain modules."""

    site: Site
    points: tuple[HookLocation, ...]  # one a layer; none: in attention, or in the residual stream
    in_place: bool = True  # patch in place: every consumer sees it; False: only the next module

    @property
    def in_attention(self) -> bool:
        return not self.points and not self.site.in_stream


def resolve_site(unwrapped: UnwrappedModel, site: Site) -> SiteLocation:
    """Return the location of `site` in `unwrapped`.

    Raises:
        Unsupported: this architecture does not have the site, or only the bridge has it.
    """
    if site.named:
        raise Unsupported(f"{site.hook} was given by its full name")
    if site.in_stream and site.layered:
        return SiteLocation(site, ())
    if site.written_as is not None:
        return SiteLocation(site, resolve_site(unwrapped, SITES[site.written_as]).points)
    points: list[HookLocation] = []
    if not site.layered:
        point = unwrapped.point(site.hook_name(0))
        if point is None:
            raise Unsupported(f"{site.hook} is at no border of the model's own modules")
        return SiteLocation(site, (point,))
    for layer in range(unwrapped.n_layers):
        hook = site.hook_name(layer)
        if not unwrapped.has_hook(hook):
            if site.in_attention:  # without rotary tables rot_q is q
                return SiteLocation(site, ())
            raise Unsupported(f"this architecture has no {hook}")
        point = None if site.in_attention else unwrapped.point(hook)
        if point is None and site.projected:
            point = _in_fused_projection(unwrapped, layer, site.name)
        if point is None:
            if site.projected or site.in_attention:
                return SiteLocation(site, ())
            raise Unsupported(f"{hook} is at no border of the model's own modules")
        points.append(point)
    return SiteLocation(site, tuple(points))


def _in_fused_projection(unwrapped: UnwrappedModel, layer: int, name: str) -> HookLocation | None:
    """Return the location of q, k or v in a fused QKV projection's output; None without one."""
    attention = getattr(unwrapped.bridge.blocks[layer], "attn", None)
    if not isinstance(attention, JointQKVAttentionBridge):
        return None
    projection = unwrapped.module_of(getattr(attention, "qkv", None))
    if projection is None:
        return None
    columns = _columns(attention, projection)
    return None if columns is None else HookLocation(projection, "out", columns[name])


def _columns(
    attention: JointQKVAttentionBridge, projection: nn.Module
) -> Mapping[str, Tensor] | None:
    """Return the output columns of `projection` that are q, k and v, by the bridge's own split.

    The bridge's function splits a matrix whose outputs hold their indices. None if it fails.
    """
    if isinstance(projection, Conv1D):
        n_in, n_out = projection.weight.shape
    elif isinstance(projection, nn.Linear):
        n_in, n_out = projection.in_features, projection.out_features
    else:
        return None
    bias = torch.arange(n_out, dtype=torch.float32, device="cpu")
    rows = bias.expand(n_in, n_out)
    weight = rows if isinstance(projection, Conv1D) else rows.T
    numbered = SimpleNamespace(weight=weight, bias=bias)
    try:
        parts = attention.split_qkv_matrix(
            _Replaced(attention.original_component, str(attention.qkv.name), numbered)
        )
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError):
        return None  # an architecture's split may need more than the matrix
    return {
        name: part.weight.detach()[:, 0].round().long()
        for name, part in zip(("q", "k", "v"), parts, strict=True)
    }


class _Replaced:
    """A view of a module in which another object replaces one child."""

    def __init__(self, module: Any, name: str, child: Any) -> None:
        self._module = module
        setattr(self, name, child)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
