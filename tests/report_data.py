"""A made-up but lifelike store: what a sweep of SmolLM2-135M over an indirect-object pair holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from patchsweep.store.save import save_dataset

N_LAYERS, N_HEADS, N_KV_HEADS = 30, 9, 3
TEMPLATES = (
    "<|im_start|>|When| {a}| and| {b}| went| to| the| sh|ops|,| {s}| gave| the| b|ag| to",
    "<|im_start|>|After| {a}| and| {b}| left| for| the| st|ation|,| {s}| handed| a| dr|ink| to",
)
NAMES = (("John", "Mary"), ("Tom", "Anna"), ("Peter", "Lucy"), ("Paul", "Sarah"))
SUBJECT = 11  # the only position at which clean and corrupted prompts differ


def prompts(pair: int, n_pos: int) -> tuple[list[str], list[str], str, str]:
    """(clean tokens, corrupted tokens, answer, wrong answer), cut to the last `n_pos` tokens."""
    a, b = NAMES[pair % len(NAMES)]
    template = TEMPLATES[(pair // len(NAMES)) % len(TEMPLATES)]
    clean = template.format(a=a, b=b, s=a).split("|")
    corrupted = template.format(a=a, b=b, s=b).split("|")
    # "<|im_start|>" holds the separator itself
    clean, corrupted = (["<|im_start|>", *t[3:]] for t in (clean, corrupted))
    return clean[-n_pos:], corrupted[-n_pos:], f" {b}", f" {a}"


def synthetic(
    *,
    n_pairs: int = 1,
    lengths: Sequence[int] = (),
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z"),
    metrics: Sequence[str] = ("logit_diff",),
    positions: bool = True,
    methods: Sequence[str] = (),
    direction: str = "denoising",
    n_layers: int = N_LAYERS,
    seed: int = 0,
) -> xr.Dataset:
    """A Dataset laid out as a store is. `lengths`: prompt length per pair (17 unless given)."""
    rng = np.random.default_rng(seed)
    lengths = list(lengths) or [17] * n_pairs
    n_pairs, n_pos = len(lengths), max(lengths)
    texts = [prompts(p, n) for p, n in enumerate(lengths)]

    def column(index: int) -> np.ndarray:
        padded = [list(t[index]) + [""] * (n_pos - len(t[index])) for t in texts]
        return np.array(padded, dtype=object)

    base, source = (column(1), column(0)) if direction == "denoising" else (column(0), column(1))
    base_metric = -2.0 - rng.random((len(metrics), n_pairs))
    source_metric = 2.5 + rng.random((len(metrics), n_pairs))
    for m, name in enumerate(metrics):
        if name == "prob":
            base_metric[m], source_metric[m] = 0.05 + 0.02 * rng.random((2, n_pairs))
            source_metric[m] += 0.6
    if direction == "noising":
        base_metric, source_metric = source_metric, base_metric

    heads = {"z": ("head", N_HEADS), "q": ("head", N_HEADS), "pattern": ("head", N_HEADS)}
    heads |= dict.fromkeys(("k", "v"), ("kv_head", N_KV_HEADS))
    heads |= {"mlp_post": ("neuron", 48)}
    variables: dict[str, tuple[list[str], np.ndarray]] = {}
    for site in sites:
        fractions = np.zeros((len(metrics), n_pairs, n_layers, n_pos, heads.get(site, ("", 1))[1]))
        for p, length in enumerate(lengths):
            made = _fractions(site, n_layers, length, fractions.shape[-1], rng)
            fractions[:, p, :, :length] = made
        values = (
            base_metric[..., None, None, None]
            + fractions * (source_metric - base_metric)[..., None, None, None]
        )
        for p, length in enumerate(lengths):
            values[:, p, :, length:] = np.nan
        dims = ["metric", "pair", "layer", "pos", heads.get(site, ("one", 1))[0]]
        if not positions:
            values, dims = np.nanmean(values, axis=3), [d for d in dims if d != "pos"]
        if site not in heads:
            values, dims = values[..., 0], dims[:-1]
        variables[site] = (dims, values.astype(np.float32))
        for method in methods:
            effects = values - base_metric.reshape(base_metric.shape + (1,) * (values.ndim - 2))
            rough = effects * (0.25 if site == "resid_pre" else 0.97)
            noise = (
                0.02 * effects.std(where=np.isfinite(effects)) * rng.standard_normal(rough.shape)
            )
            variables[f"{site}_{method}"] = (dims, (rough + noise).astype(np.float32))

    ds = xr.Dataset(
        {name: (dims, values) for name, (dims, values) in variables.items()},
        coords={
            "metric": np.array(metrics, dtype=object),
            "pair": np.arange(n_pairs),
            "layer": np.arange(n_layers),
            "base_token": (["pair", "pos" if positions else "token"], base),
            "source_token": (["pair", "pos" if positions else "token"], source),
            "answer": ("pair", np.array([t[2] for t in texts], dtype=object)),
            "wrong_answer": ("pair", np.array([t[3] for t in texts], dtype=object)),
        },
        attrs=_attrs(sites, n_layers, n_pairs, n_pos, direction),
    )
    if positions:
        ds = ds.assign_coords(pos=np.arange(n_pos))
    for name, n in {heads[s] for s in sites if s in heads}:
        ds = ds.assign_coords({name: np.arange(n)})
    ds["base_metric"] = (["metric", "pair"], base_metric.astype(np.float32))
    ds["source_metric"] = (["metric", "pair"], source_metric.astype(np.float32))
    return ds


def write(ds: xr.Dataset, store: Path, *, journal: bool = False) -> Path:
    """The store on disk, with a journal beside it (and its last line torn) when asked for."""
    save_dataset(ds, store)
    if journal:
        folder = Path(f"{store}.journal")
        folder.mkdir()
        lines = [
            {
                **{"event": "unit", "time": 1.0 + i, "variable": s, "seconds": 0.25 * (i + 1)},
                **{"pair_block": 0, "layer_block": 0, "token_layers": 100},
            }
            for i, s in enumerate(("resid_pre", "z"))
        ]
        text = "\n".join(json.dumps(line) for line in [{"event": "started", "time": 0}, *lines])
        (folder / "4711.jsonl").write_text(text + '\n{"event": "unit", "sec')
    return store


def _fractions(
    site: str, n_layers: int, n_pos: int, n_units: int, rng: np.random.Generator
) -> np.ndarray:
    """Recovered fractions [layer, pos, unit]: the name until mid-depth, then the last token."""
    layer = np.arange(n_layers)[:, None] / max(1, n_layers - 1)
    subject = min(SUBJECT, n_pos - 2)
    moved = 1 / (1 + np.exp(-(layer[:, 0] - 0.55) * 25))
    out = np.zeros((n_layers, n_pos, n_units))
    noise = 0.01 * rng.standard_normal(out.shape)
    if site.startswith("resid"):
        out[:, subject, 0], out[:, -1, 0] = 1 - moved, moved
        out[:, subject + 1, 0] = 0.15 * np.exp(-((layer[:, 0] - 0.3) ** 2) * 40)
    elif n_units == 1:
        out[:, -1, 0] = 0.4 * np.exp(-((layer[:, 0] - 0.6) ** 2) * 300) * rng.random(n_layers)
        out[:, subject, 0] = 0.2 * np.exp(-(layer[:, 0] ** 2) * 60)
    else:
        same = np.random.default_rng(n_units)  # the same heads matter in every pair
        for size in (-0.2, -0.12, 0.15, 0.2, 0.3, 0.35):
            at = same.integers(n_layers // 2, n_layers), -1, same.integers(n_units)
            out[at] = size
        out[n_layers // 3, subject, n_units // 2] = 0.12
    out += noise
    out[:, :subject] = 0.0  # nothing before the first differing token can change the metric
    return out


def _attrs(
    sites: Sequence[str], n_layers: int, n_pairs: int, n_pos: int, direction: str
) -> dict[str, object]:
    plan = {}
    for site in sites:
        cells = n_pairs * n_layers * n_pos * (N_HEADS if site in ("z", "q") else 1)
        live = cells * 6 // 17
        loop = cells * n_layers * n_pos
        plan[site] = {
            "n_patches": cells,
            "n_live": live,
            "n_dead": cells - live,
            "token_layers": loop // 21,
            "loop_token_layers": loop,
        }
    return {
        "patchsweep_version": "0.1.0",
        "provenance": {
            "model": "smollm2-135m",
            "revision": None,
            "weights_hash": "sha256:5d3fa7f1b1c2",
            "dtype": "float32",
            "runner": "packed",
            "runner_reason": "the probe agreed with the bridge to 2.1e-06",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "transformer_lens": "4.3.0"},
            "config": {"sites": list(sites), "direction": direction, "seed": 0},
            "task": "indirect_object",
        },
        "plan": plan,
        "direction": direction,
        "intervention": "resample",
        "method": "exact",
    }
