"""`transformer_lens.patching` in packed batches: `import patchsweep.transformer_lens as patching`.

The module has all names of `transformer_lens.patching`, with the same signatures and results.
The `get_act_patch_*` functions over layers, positions and heads run in packed batches; direct
path patching and custom patch setters run in TransformerLens's own loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens import patching as tl
from transformer_lens.patching import (
    AxisNames,
    CorruptedActivation,
    Logits,
    MetricFn,
    PatchedActivation,
    PatchingResult,
    Reduce,
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)

from patchsweep.transformer_lens.sweep import generic_activation_patch

__all__ = [
    "AxisNames",
    "CorruptedActivation",
    "Logits",
    "MetricFn",
    "PatchedActivation",
    "PatchingResult",
    "Reduce",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]


def _packed(theirs: partial[Any]) -> partial[Any]:
    """Return the sweep `theirs` (setter, activation, axes, docstring) on our generic function."""
    ours = partial(generic_activation_patch, **theirs.keywords)
    ours.__doc__ = theirs.__doc__
    return ours


get_act_patch_resid_pre = _packed(tl.get_act_patch_resid_pre)
get_act_patch_resid_mid = _packed(tl.get_act_patch_resid_mid)
get_act_patch_attn_out = _packed(tl.get_act_patch_attn_out)
get_act_patch_mlp_out = _packed(tl.get_act_patch_mlp_out)
get_act_patch_attn_head_out_by_pos = _packed(tl.get_act_patch_attn_head_out_by_pos)
get_act_patch_attn_head_q_by_pos = _packed(tl.get_act_patch_attn_head_q_by_pos)
get_act_patch_attn_head_k_by_pos = _packed(tl.get_act_patch_attn_head_k_by_pos)
get_act_patch_attn_head_v_by_pos = _packed(tl.get_act_patch_attn_head_v_by_pos)
get_act_patch_attn_head_pattern_by_pos = _packed(tl.get_act_patch_attn_head_pattern_by_pos)
get_act_patch_attn_head_pattern_dest_src_pos = _packed(
    tl.get_act_patch_attn_head_pattern_dest_src_pos
)
get_act_patch_attn_head_out_all_pos = _packed(tl.get_act_patch_attn_head_out_all_pos)
get_act_patch_attn_head_q_all_pos = _packed(tl.get_act_patch_attn_head_q_all_pos)
get_act_patch_attn_head_k_all_pos = _packed(tl.get_act_patch_attn_head_k_all_pos)
get_act_patch_attn_head_v_all_pos = _packed(tl.get_act_patch_attn_head_v_all_pos)
get_act_patch_attn_head_pattern_all_pos = _packed(tl.get_act_patch_attn_head_pattern_all_pos)


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any, **kwargs: Any
) -> Tensor | PatchingResult:
    """Patch every head at all positions, per activation type: `[5, n_layers, n_heads]`.

    Types: output, query, key, value, pattern. With grouped heads, k and v are padded with zeros
    to `n_heads`, as in TransformerLens. `kwargs` are `reduce` and `baseline` of
    `generic_activation_patch`, which decide whether the result is a `PatchingResult`.
    """
    sweeps = {
        "out": get_act_patch_attn_head_out_all_pos,
        "q": get_act_patch_attn_head_q_all_pos,
        "k": get_act_patch_attn_head_k_all_pos,
        "v": get_act_patch_attn_head_v_all_pos,
        "pattern": get_act_patch_attn_head_pattern_all_pos,
    }
    runs = (model, corrupted_tokens, clean_cache, metric)
    return _every(sweeps, ("layer", "head"), runs, kwargs)


def get_act_patch_attn_head_by_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any, **kwargs: Any
) -> Tensor | PatchingResult:
    """Patch every head by position, per activation type: `[5, n_layers, pos, n_heads]`.

    Types, padding and `kwargs` as in `get_act_patch_attn_head_all_pos_every`.
    """
    sweeps = {
        "out": get_act_patch_attn_head_out_by_pos,
        "q": get_act_patch_attn_head_q_by_pos,
        "k": get_act_patch_attn_head_k_by_pos,
        "v": get_act_patch_attn_head_v_by_pos,
        "pattern": get_act_patch_attn_head_pattern_by_pos,
    }
    runs = (model, corrupted_tokens, clean_cache, metric)
    return _every(sweeps, ("layer", "pos", "head"), runs, kwargs)


def get_act_patch_block_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any, **kwargs: Any
) -> Tensor | PatchingResult:
    """Patch resid_pre, attn_out and mlp_out by position: `[3, n_layers, pos]`.

    `kwargs` as in `get_act_patch_attn_head_all_pos_every`.
    """
    sweeps = {
        "resid_pre": get_act_patch_resid_pre,
        "attn_out": get_act_patch_attn_out,
        "mlp_out": get_act_patch_mlp_out,
    }
    return _every(sweeps, ("layer", "pos"), (model, corrupted_tokens, clean_cache, metric), kwargs)


def _every(
    sweeps: Mapping[str, partial[Any]],
    axes: tuple[str, ...],
    runs: tuple[Any, Tensor, Any, Any],
    kwargs: dict[str, Any],
) -> Tensor | PatchingResult:
    """Stack all sweeps on a leading patch_type axis, axes in the order `axes`, heads padded.

    `runs`: model, tokens, cache and metric. Only the first sweep computes the baseline.
    """
    baseline = bool(kwargs.pop("baseline", False))
    results = [
        sweep(*runs, baseline=baseline and i == 0, **kwargs)
        for i, sweep in enumerate(sweeps.values())
    ]
    first = results[0]
    typed = isinstance(first, PatchingResult)
    lead = int(typed and first.has_metric_axis)  # the metric axis stays first, the batch axis last
    renamed = {"head_index": "head", "dest_pos": "pos"}
    values = []
    for sweep, result in zip(sweeps.values(), results, strict=True):
        names = [renamed.get(name, name) for name in sweep.keywords["index_axis_names"]]
        x: Tensor = result.values if typed else result
        order = [lead + names.index(axis) for axis in axes]
        x = x.permute(*range(lead), *order, *range(lead + len(axes), x.ndim))
        if "head" in axes:
            head = lead + axes.index("head")
            widths = [0, 0] * (x.ndim - 1 - head) + [0, runs[0].cfg.n_heads - x.shape[head]]
            x = torch.nn.functional.pad(x, widths)
        values.append(x)
    stacked = torch.stack(values, dim=lead)
    if not typed:
        return stacked
    names = ["patch_type", *axes]
    return PatchingResult(
        values=stacked,
        axis_names=names,
        index_df=make_df_from_ranges(list(stacked.shape[lead : lead + len(names)]), names),
        metric_names=list(first.metric_names),
        reduced=first.reduced,
        baseline=first.baseline,
        has_metric_axis=first.has_metric_axis,
        patch_type_names=list(sweeps),
    )
