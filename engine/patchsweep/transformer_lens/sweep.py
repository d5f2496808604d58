"""`generic_activation_patch` of TransformerLens, with the patched runs in packed batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching as tl
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge, check_tolerance
from patchsweep.errors import ConfigError, MetricError, PlanError, PromptError
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.arithmetic import autocast_devices
from patchsweep.models.offload import device_of
from patchsweep.models.running import alone, training_module, users_hooks
from patchsweep.runners.packed.adaptive_runner import QUERIES
from patchsweep.transformer_lens.adaptive import AdaptiveModel, within
from patchsweep.transformer_lens.cells import Cells, differing, live_rows, make_cells
from patchsweep.transformer_lens.gradients import Metric, check_tolerated
from patchsweep.transformer_lens.packed import PackedCells, PrecomputedModel

# TransformerLens's loop finishes sweeps of so few cells before packed batches are set up
FEW_CELLS = 4
N_PROBES = 3
# largest difference in logits from rounding, as a fraction of the largest logit (13 units in its
# last place); in fp32 it is 1e-3 for logits of any size
ROUNDING = {torch.float16: 0.00625, torch.bfloat16: 0.05}
AXES = get_args(tl.AxisNames)

Setter = Callable[[Tensor, Sequence[int], Any], Tensor]


def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    patching_metric: Metric | Mapping[str, Metric],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[tl.AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    tolerance: float | str | None = None,
) -> Tensor | tuple[Tensor, pd.DataFrame] | tl.PatchingResult:
    """Return what `transformer_lens.patching.generic_activation_patch` returns, in less time.

    TransformerLens's function still runs the sweep: it builds the index, calls the metric on full
    logits `[batch, pos, d_vocab]`, reduces, and raises errors. Packed batches replace only its
    forward passes, and only for TransformerLens's own patch setters. All else runs in its own
    loop; for a built-in sweep a warning then states the reason.

    `tolerance` is the largest error that values may have, in units of the metric, or as a share of
    |clean - corrupted| such as "1%": what a patch changes is run, the rest is taken to first order
    (see `adaptive`). Default: every cell runs exactly.

    Raises:
        PatchsweepError: an argument has the wrong type, or the tolerance cannot be met; raised
            before any forward pass where that can be known.
    """
    check_bridge(model)
    _check_tokens(model, corrupted_tokens)
    _check(clean_cache, patching_metric, patch_setter, index_axis_names, index_df)
    check_tolerance(tolerance)
    arguments: dict[str, Any] = {
        "activation_name": activation_name,
        "index_axis_names": index_axis_names,
        "index_df": index_df,
        "return_index_df": return_index_df,
        "reduce": reduce,
        "baseline": baseline,
    }
    metrics = (
        dict(patching_metric)
        if isinstance(patching_metric, Mapping)
        else {"metric": patching_metric}
    )
    if tolerance is not None:
        check_tolerated(tolerance, model, metrics, corrupted_tokens)
    with alone(model):
        sweep_model: TransformerBridge | PrecomputedModel = model
        try:
            cells = _cells(
                model, corrupted_tokens, patch_setter, activation_name, index_axis_names, index_df
            )
            sweep_model = _stand_in(
                model, corrupted_tokens, clean_cache, patch_setter, cells, tolerance, metrics
            )
        except Unsupported as error:
            if error.reason and tolerance is not None:
                raise ConfigError(
                    f"tolerance={tolerance!r} needs packed batches, and {activation_name} cannot "
                    f"be patched in them: {error.reason}; leave the tolerance out"
                ) from error
            if error.reason:
                warnings.warn(
                    f"{activation_name} is patched by TransformerLens's own loop, not in packed "
                    f"batches: {error.reason}",
                    stacklevel=2,
                )
        if isinstance(sweep_model, AdaptiveModel):
            metrics = sweep_model.metrics
            if sweep_model.level is None:
                warnings.warn(
                    f"{activation_name} is patched exactly: no thresholds met "
                    f"tolerance={tolerance!r} on a sample of {sweep_model.n_sample} cells",
                    stacklevel=2,
                )
        return tl.generic_activation_patch(
            sweep_model,
            corrupted_tokens,
            clean_cache,
            metrics if isinstance(patching_metric, Mapping) else metrics["metric"],
            patch_setter,
            **arguments,
        )


def _check_tokens(model: TransformerBridge, tokens: Any) -> None:
    """Raise unless `tokens` are of the model."""
    kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
    if kind not in (torch.int64, torch.int32):
        raise PromptError(
            f"corrupted_tokens of {kind} must be token ids [batch, pos]; give what "
            "model.to_tokens(...) returns"
        )
    d_vocab = int(model.cfg.d_vocab)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < d_vocab:
        raise PromptError(
            f"corrupted_tokens has the ids {int(tokens.min())}..{int(tokens.max())}, and this "
            f"model knows 0..{d_vocab - 1}; make them with its own tokenizer"
        )


def _check(cache: Any, metric: Any, setter: Any, axes: Any, index_df: Any) -> None:
    """Raise for arguments of a wrong type that TransformerLens does not check itself."""
    metrics = metric.values() if isinstance(metric, Mapping) else [metric]
    if not all(callable(function) for function in metrics):
        raise MetricError(
            f"patching_metric={metric!r} must be a function of logits, or a mapping from names to "
            "functions"
        )
    if not hasattr(cache, "__getitem__"):
        raise ConfigError(
            f"clean_cache is a {type(cache).__name__}; give the cache of model.run_with_cache(...)"
        )
    if not callable(setter):
        raise ConfigError(
            f"patch_setter={setter!r} must be a function, such as layer_pos_patch_setter"
        )
    if (axes is None) == (index_df is None):
        raise PlanError(
            f"{'neither' if axes is None else 'both'} of index_axis_names and index_df given; give "
            "one of them"
        )
    unknown = [axis for axis in axes or () if axis not in AXES]
    if unknown:
        raise PlanError(
            f"index_axis_names has {unknown[0]!r}, which is no axis; use some of {', '.join(AXES)}"
        )


class _NothingToGain(Unsupported):
    """Packed batches bring no gain here, so TransformerLens's loop runs without a warning."""

    def __init__(self) -> None:
        super().__init__("")


def _cells(
    model: TransformerBridge,
    tokens: Tensor,
    setter: Setter,
    activation_name: str,
    axes: Sequence[str] | None,
    index_df: pd.DataFrame | None,
) -> Cells:
    """Return the cells of the sweep, unless they are few or TransformerLens refuses them itself."""
    if tokens.ndim != 2 or training_module(model) is not None:
        raise _NothingToGain
    n_heads = model.cfg.n_heads
    if activation_name in ("k", "v") and model.cfg.n_key_value_heads is not None:
        n_heads = model.cfg.n_key_value_heads
    n_pos = int(tokens.shape[-1])
    ranges = {"layer": model.cfg.n_layers, "pos": n_pos, "src_pos": n_pos, "dest_pos": n_pos}
    ranges |= {"head": n_heads, "head_index": n_heads}
    if axes is not None:
        index_df = tl.make_df_from_ranges([ranges[axis] for axis in axes], axes)
    assert index_df is not None  # one of the two was given
    if len(index_df) <= FEW_CELLS:
        raise _NothingToGain
    n_units = int(model.cfg.d_mlp or 0) if activation_name in ("post", "mlp_post") else n_heads
    sizes = {"layer": int(model.cfg.n_layers), "pos": n_pos, "unit": int(n_units)}
    return make_cells(setter, activation_name, index_df, sizes)


def _stand_in(
    model: TransformerBridge,
    tokens: Tensor,
    clean_cache: ActivationCache,
    setter: Setter,
    cells: Cells,
    tolerance: float | str | None,
    metrics: Mapping[str, Metric],
) -> PrecomputedModel:
    """Return a model that knows the logits of all cells, after a self-test against the bridge.

    Raises:
        Unsupported: the model, the cache or a user's hook needs TransformerLens's loop.
    """
    hooked = users_hooks(model)
    if hooked:
        raise Unsupported(f"the model carries a hook at {hooked[0]}, which is to see every run")
    if autocast_devices():
        raise Unsupported("torch.autocast is on, under which runs differ by more than rounding")
    tokens = tokens.to(device_of(model))
    names = {layer: cells.site.hook_name(layer) for layer in cells.layers}
    base_logits, base, needs_grad = _base_run(model, tokens, names)
    clean: dict[int, Tensor] = {}
    for layer, name in names.items():
        try:
            value = clean_cache[name]
            clean[layer] = value.detach().to(base[layer]).expand_as(base[layer])
        except (KeyError, RuntimeError) as error:
            raise Unsupported(f"clean_cache has nothing that fits {name}") from error
    differs = {layer: differing(base[layer], clean[layer], cells) for layer in names}
    rows = live_rows(cells, differs)
    if not len(rows):
        return PrecomputedModel(model, base_logits, iter([[] for _ in range(len(cells))]))
    rounding = max(1e-3, ROUNDING.get(base_logits.dtype, 0.0) * float(base_logits.abs().max()))
    try:
        # a tensor that requires a gradient is copied before the patch, so other readers of the
        # original do not see the patch
        keep = () if tolerance is None else QUERIES
        batches = PackedCells(
            model, tokens, cells, rows, base, clean, in_place=not needs_grad, keep=keep
        )
        for indices, part in batches.base_logits():
            expected = base_logits.flatten(0, 1)[torch.from_numpy(indices).to(tokens.device)]
            _agree(part, expected, rounding, "the unpatched run")
        live = np.unique(rows.cell)
        probes = live[np.linspace(0, len(live) - 1, N_PROBES).astype(np.int64)]
        for cell, changed in zip(probes.tolist(), batches.written(probes.tolist()), strict=True):
            hook = _hook(setter, cells.index[cell].tolist(), clean[int(cells.layer[cell])])
            name = names[int(cells.layer[cell])]
            patched = model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]).detach()
            for where, logits in changed:
                _agree(logits, patched[where], rounding, "a patched run")
    except Unsupported:
        raise
    except Exception as error:  # an architecture whose blocks packed batches cannot run
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    if tolerance is None:
        return PrecomputedModel(model, base_logits, batches.written(range(len(cells))))
    return within(tolerance, model, tokens, clean_cache, base_logits, batches, metrics)


def _base_run(
    model: TransformerBridge, tokens: Tensor, names: Mapping[int, str]
) -> tuple[Tensor, dict[int, Tensor], bool]:
    """Return the unpatched run's logits, activations at `names`, whether they need gradients."""
    activations: dict[int, Tensor] = {}
    needs_grad: list[bool] = []

    def keep(x: Tensor, layer: int) -> None:
        activations[layer] = x.detach().clone()
        needs_grad.append(x.requires_grad)

    hooks = [(name, lambda x, hook, layer=layer: keep(x, layer)) for layer, name in names.items()]
    if not set(names.values()) <= set(model.hook_dict):
        raise _NothingToGain  # TransformerLens names the missing hook
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    if len(activations) < len(names):
        raise Unsupported("its hook does not fire in every layer")
    return logits.detach(), activations, any(needs_grad)


def _hook(setter: Setter, index: list[int], clean: Tensor) -> Callable[[Tensor, Any], Tensor]:
    def patch(x: Tensor, hook: Any) -> Tensor:
        return setter(x.clone() if x.requires_grad else x, index, clean)

    return patch


def _agree(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    if ours.shape != theirs.shape:
        raise Unsupported(f"{what} has logits {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    difference = float((ours.float() - theirs.float()).abs().max())
    if not difference <= tolerance:
        raise Unsupported(f"{what} differs from the bridge by {difference:.2g} in logits")
