"""The exact sweep beside the ways people do it today: same model object, pair and process.

    make bench

Each contender's values are compared with the others' before its time counts. Where a loop would
take many minutes, a sample of its patches is timed; its figure is then patches per second of the
sample, and `timed_patches` says how many ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import patchsweep as ps
import pytest
import torch
import transformer_lens.patching as tl_patching
import xarray as xr
from conftest import Subject, machine, matmul_peak
from patchsweep.models.gguf import bundled_folder
from patchsweep.spec.spec import SweepSpec, make_request
from transformers import AutoModelForCausalLM

SITES = ("resid_pre", "attn_out", "mlp_out", "z")  # what `make demo` sweeps
# fp32 logits of order 20; every contender sums in another order
TOLERANCE = 1e-4


def _ours(subject: Subject, sites: Sequence[str]) -> xr.Dataset:
    return ps.sweep(subject.model, subject.pairs, sites)  # as the README calls it


@pytest.mark.parametrize("site", ["resid_pre", "z", "demo"])
def bench_patchsweep(benchmark, subject: Subject, cells: dict, site: str) -> None:
    """`demo` is all four sites in one sweep."""
    sites = SITES if site == "demo" else (site,)
    ds = _ours(subject, sites)  # also the warm-up
    cells.update({name: ds[name].values[0, 0] for name in sites})
    benchmark.pedantic(_ours, (subject, sites), rounds=5, warmup_rounds=1)
    request = make_request(subject.model, subject.pairs, SweepSpec(sites))
    patches = sum(plan.n_patches for plan in request.plans)
    token_layers = sum(plan.token_layers for plan in request.plans)
    # what passes the blocks: the patches, and the two prompts once
    captured = 2 * subject.clean.shape[1] * subject.model.cfg.n_layers
    flops = 2 * (token_layers + captured) * request.shape.block_parameters
    peak = matmul_peak()
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        machine(),
        patches=patches,
        timed_patches=patches,
        token_layers=token_layers,
        patches_per_second=patches / seconds,
        matmul_peak_gflops=peak / 1e9,
        share_of_peak=flops / seconds / peak,
    )


@pytest.mark.parametrize("site", SITES)
def bench_transformer_lens_loop(benchmark, subject: Subject, cells: dict, site: str) -> None:
    layers, length = subject.model.cfg.n_layers, subject.clean.shape[1]
    heads = subject.model.cfg.n_heads
    names = ["layer", "pos"] + (["head_index"] if site == "z" else [])
    sizes = [layers, length] + ([heads] if site == "z" else [])
    every = pd.DataFrame(np.argwhere(np.ones(sizes)), columns=names)
    # the whole loop for the residual stream, a sample where it would take ten minutes
    rows = every if site == "resid_pre" else every.sample(120, random_state=0)
    _, cache = subject.model.run_with_cache(subject.clean)
    setter = (
        tl_patching.layer_pos_head_vector_patch_setter
        if site == "z"
        else tl_patching.layer_pos_patch_setter
    )

    @torch.no_grad()
    def loop(rows: pd.DataFrame) -> np.ndarray:
        return tl_patching.generic_activation_patch(
            subject.model,
            subject.corrupted,
            cache,
            subject.metric,
            setter,
            site,
            index_df=rows,
        ).numpy()

    loop(rows.head(3))
    values = _timed(benchmark, lambda: loop(rows))
    index = tuple(rows[name].to_numpy() for name in names)
    difference = _check(cells, subject, site, values, index)
    _record(benchmark, len(every), len(rows), len(rows) * layers * length, difference)


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def bench_batched_hooks(benchmark, subject: Subject, cells: dict, site: str) -> None:
    """One forward pass per layer, the batch axis over positions (and heads)."""
    model, length = subject.model, subject.clean.shape[1]
    heads = range(model.cfg.n_heads) if site == "z" else [None]
    places = [(pos, head) for pos in range(length) for head in heads]
    _, cache = model.run_with_cache(subject.clean)
    layers = range(model.cfg.n_layers) if site == "resid_pre" else range(0, model.cfg.n_layers, 6)

    @torch.no_grad()
    def run() -> np.ndarray:
        values = []
        for layer in layers:
            name = f"blocks.{layer}." + ("hook_resid_pre" if site == "resid_pre" else "attn.hook_z")

            def patch(x: torch.Tensor, hook: object, name: str = name) -> torch.Tensor:
                for row, (pos, head) in enumerate(places):
                    where = (row, pos) if head is None else (row, pos, head)
                    x[where] = cache[name][(0, *where[1:])]
                return x

            tokens = subject.corrupted.expand(len(places), -1)
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, patch)])[:, -1]
            values.append(logits[:, subject.answer] - logits[:, subject.wrong])
        return torch.stack(values).numpy()

    values = _timed(benchmark, run)
    shape = (len(layers), length) if site == "resid_pre" else (len(layers), length, len(heads))
    index = np.ix_(list(layers), *(range(n) for n in shape[1:]))
    difference = _check(cells, subject, site, values.reshape(shape), index)
    total = model.cfg.n_layers * len(places)
    timed = len(layers) * len(places)
    _record(benchmark, total, timed, timed * model.cfg.n_layers * length, difference)


def _timed(benchmark, run: Callable[[], np.ndarray]) -> np.ndarray:
    """One round: a loop of minutes has its quantiles in its patches."""
    return benchmark.pedantic(run, rounds=1)


def _check(cells: dict, subject: Subject, site: str, values: np.ndarray, index: tuple) -> float:
    if site not in cells:
        cells[site] = _ours(subject, [site])[site].values[0, 0]
    difference = float(np.abs(cells[site][index] - values).max())
    assert difference < TOLERANCE, difference
    return difference


def _record(benchmark, patches: int, timed: int, token_layers: int, difference: float) -> None:
    benchmark.extra_info.update(
        machine(),
        patches=patches,
        timed_patches=timed,
        token_layers=token_layers,
        patches_per_second=timed / benchmark.stats.stats.median,
        largest_difference=difference,
    )


def bench_nnsight(benchmark, subject: Subject, cells: dict) -> None:
    """nnsight with batched invokes: one forward pass per layer, one invoke per position.

    It runs the plain Hugging Face modules, which are faster than a bridge's; same weights.
    """
    nnsight = pytest.importorskip("nnsight", reason="pip install nnsight to measure it too")
    folder = bundled_folder("smollm2-135m")
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = nnsight.LanguageModel(hf_model, tokenizer=subject.model.tokenizer)
    layers, length = range(0, subject.model.cfg.n_layers, 3), subject.clean.shape[1]

    @torch.no_grad()
    def run(layers: range = layers) -> np.ndarray:
        values = []
        for layer in layers:
            with model.trace(subject.clean):
                source = model.model.layers[layer].input.save()
            with model.trace() as tracer:
                logits = list().save()  # noqa: C408  # a call, so that nnsight can keep it
                for pos in range(length):
                    with tracer.invoke(subject.corrupted):
                        model.model.layers[layer].input[:, pos] = source[:, pos]
                        logits.append(model.lm_head.output[:, -1])
            values.append([float(x[0, subject.answer] - x[0, subject.wrong]) for x in logits])
        return np.array(values)

    run(range(1))
    values = _timed(benchmark, run)
    index = np.ix_(list(layers), range(length))
    difference = _check(cells, subject, "resid_pre", values, index)
    benchmark.extra_info["site"] = "resid_pre"
    total, timed = subject.model.cfg.n_layers * length, len(layers) * length
    _record(benchmark, total, timed, timed * subject.model.cfg.n_layers * length, difference)
