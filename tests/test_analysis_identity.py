"""Stores of analyses: each argument that can change a number is part of what they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.edges import edges, exact_edges, screen_edges
from patchsweep.analyses.circuits.scores import circuit_scores
from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.heads.study import study
from patchsweep.analyses.logit_lens import lens
from patchsweep.analyses.logit_lens.patches import Patch
from patchsweep.analyses.logit_lens.sublayers import sublayers
from patchsweep.analyses.stages import Stages
from patchsweep.attribution import IntegratedInputs
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import StoreError
from patchsweep.spec.interventions import Custom, Mean
from patchsweep.store.attributes import flat_attributes
from patchsweep.store.difference import attribute_differences
from patchsweep.store.save import load_dataset, save_dataset
from patchsweep.sweeps.identity import read_weights
from subjects import model, reference_pairs
from test_identity import edited, pairs
from transformer_lens.model_bridge import TransformerBridge

NAME = "tiny:llama"
COMMON: dict[str, Any] = {"model": lambda: model(NAME), "pairs": pairs}
# cases that all have
OTHERS: dict[str, tuple[Any, str]] = {
    "model": (edited, "the weights differ"),
    "pairs": (
        lambda: pairs(second="sold"),
        "corrupted prompts differ, first in pair 1",
    ),
    "metrics": ("prob", r"metrics\[0\] is prob in this run and logit_diff"),
    "read": (-2, "read is -2 in this run and -1 in"),
    "config": ({"seed": 1}, "provenance.config.seed is only in this run"),
    "means_from": (
        lambda: PromptPairs((*reference_pairs(NAME), *pairs())),
        "over 6 prompts, .* and mean.* over 4 prompts",
    ),
}
_FOUR = {"means_from": lambda: reference_pairs(NAME)}
WITH_MEANS: dict[str, dict[str, Any]] = {
    "edges": {"intervention": "mean", **_FOUR},
    "exact_edges": {"intervention": "mean", **_FOUR},
    "circuit": {"ablation": "mean", **_FOUR},
    "heads": {"ablations": ["resample", "mean"], **_FOUR},
}


def common_of(kind: str, argument: str) -> dict[str, Any]:
    """What else a run and the one before have in common where `argument` differs."""
    if argument == "means_from":
        return WITH_MEANS[kind]
    if argument == "tolerance":
        return {"edges": {"top": "all"}, "exact_edges": {"edges": "all"}}[kind]
    return {"steps": 2} if argument in ("rule", "rtol") else {}


_BY = "intervention is zero in this run and resample in"
_PATCH = Patch("z", 1, 15, 0)

Function = Callable[..., Any]
# analysis -> (it, arguments, argument -> (other, words))
ANALYSES: dict[str, tuple[Function, dict[str, Any], dict[str, Any]]] = {
    "edges": (
        screen_edges,
        {"top": 3},
        {
            "top": (4, "top is 4 in this run and 3 in"),
            "direction": ("noising", "direction is noising in"),
            "intervention": ("zero", _BY),
            "steps": (2, "steps is 2 in this run and None in"),
            "rule": ("left", "rule is left in this run and gauss in"),
            "rtol": (0.1, "rtol is 0.1 in this run and 0.01 in"),
            "positions": (True, "positions is True in this run and False in"),
            "tolerance": (0.1, "tolerance is 0.1 in this run and None in"),
        },
    ),
    "circuit": (
        circuit,
        {"sizes": [1, 5]},
        {
            "level": ("nodes", "level is nodes in this run and edges in"),
            "method": (IntegratedInputs(n_steps=2), "method.eap_ig is only in this run"),
            "growth": ("greedy", "growth is greedy in this run and top in"),
            "sizes": ([1, 6], r"sizes\[1\] is 6 in this run and 5 in"),
            "ablation": ("zero", "ablation is zero in this run and resample in"),
            "rank_by": ("signed", "rank_by is signed in this run and size in"),
            "scores": (
                lambda: circuit_scores(model(NAME), pairs()),
                "method is scores in this run|scores is ",
            ),
        },
    ),
    "lens": (
        lens,
        {"patch": _PATCH, "remove": ("mlp", 1)},
        {
            "which": ("clean", "prompt is clean, the base of noising in this run and corrupted"),
            "direction": ("noising", "prompt is clean, the base of noising in this run and corr"),
            "remove": (("attn", 1), r"patches\[1\].site is attn_out in this run and mlp_out in"),
            "patch": (Patch("z", 1, 15, 1), r"patches\[0\].head is 1 in this run and 0 in"),
            "top": (6, "top is 6 in this run and 5 in"),
        },
    ),
    "heads": (
        study,
        {"ablations": ["resample", "optimal"], "optimal": OptimalSettings(heads=1, steps=1)},
        {
            "ablations": (["resample", "zero"], "ablations.zero is only in this run"),
            "positions": (None, "positions"),
            "optimal": (OptimalSettings(heads=2, steps=1), "optimal.heads is 2 in this run and 1"),
            "thresholds": (Thresholds(movers=7), "thresholds.movers is 7 in this run and 8 in"),
            "classes": ({"mine": [(1, 1)]}, "classes is .* in this run and None in"),
            "runner": ("hooked", "runner is hooked in this run and auto in"),
            "max_tokens": (64, "max_tokens is 64 in this run and None in"),
        },
    ),
    "attention": (
        attention,
        {"top": 2},
        {
            "direction": ("noising", "direction is noising in"),
            "heads": ([(1, 2)], r"heads is \[\[1, 2\]\] in this run and None in"),
            "top": (3, "top is 3 in this run and 2 in"),
            "predictions": (4, "predictions is 4 in this run and 10 in"),
        },
    ),
}
NO_NUMBER = {"stages", "stage"}


def arguments_of(kind: str) -> list[str]:
    every = inspect.signature(ANALYSES[kind][0]).parameters
    return [name for name in every if name not in NO_NUMBER]


def value_of(given: Any) -> Any:
    return given() if callable(given) else given


class Described(Stages):
    """Returns the attributes by which a store knows the results, and computes nothing."""

    def results(self, model: TransformerBridge, attrs: Any, compute: Any) -> xr.Dataset:
        read_weights(model)
        return xr.Dataset(attrs=attrs())


def described(kind: str, **more: Any) -> dict[str, Any]:
    analysis, arguments, _ = ANALYSES[kind]
    given = {**COMMON, **arguments, **more}
    if kind == "heads" and more.get("positions", "all") is None:
        given["ablations"] = ["resample", "zero"]  # optimal is for all positions together
    values = {name: value_of(value) for name, value in given.items()}
    attrs: dict[str, Any] = analysis(**values, stages=Described()).attrs
    return attrs


@pytest.mark.parametrize("kind", ANALYSES)
def test_results_are_found_again_by_their_description(kind: str, tmp_path: Path) -> None:
    analysis, arguments, _ = ANALYSES[kind]
    given = {name: value_of(value) for name, value in {**COMMON, **arguments}.items()}
    ds = analysis(**given)
    save_dataset(ds, tmp_path / "a.zarr")
    found = load_dataset(tmp_path / "a.zarr", described(kind))
    assert found is not None
    xr.testing.assert_equal(found, ds)


@pytest.mark.parametrize(
    ("kind", "argument"), [(kind, name) for kind in ANALYSES for name in arguments_of(kind)]
)
def test_store_refuses_an_analysis_in_which_one_argument_differs(
    kind: str, argument: str, tmp_path: Path
) -> None:
    cases = {**OTHERS, **ANALYSES[kind][2]}
    assert argument in cases, f"say what a store of {kind} answers to another {argument}"
    other, words = cases[argument]
    common = common_of(kind, argument)
    expect_refusal(
        tmp_path / "a.zarr",
        xr.Dataset({"x": ("i", np.zeros(2))}, attrs=flat_attributes(described(kind, **common))),
        described(kind, **common),
        described(kind, **{**common, argument: other}),
        words,
    )


def expect_refusal(
    place: Path, ds: xr.Dataset, attrs: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    """A store of `ds` is found by `attrs`, and refuses `other` in these words."""
    save_dataset(ds, place)
    assert load_dataset(place, attrs) is not None
    with pytest.raises(StoreError, match=f"holds other results: .*(?:{words})"):
        load_dataset(place, other)


def test_store_refuses_a_patch_by_a_mean_over_other_prompts(tmp_path: Path) -> None:
    def attrs(reference: PromptPairs) -> dict[str, Any]:
        return described("lens", patch=Patch("z", 1, 15, 0, Mean(reference=reference)))

    some, (more, words) = attrs(reference_pairs(NAME)), OTHERS["means_from"]
    stored = xr.Dataset({"x": ("i", np.zeros(2))}, attrs=flat_attributes(some))
    expect_refusal(tmp_path / "a.zarr", stored, some, attrs(more()), words)


def test_values_of_a_patch_are_known_by_content_or_version(tmp_path: Path) -> None:
    def attrs(value: Any) -> dict[str, Any]:
        return described("lens", patch=Patch("z", 1, 15, 0, value))

    stored = xr.Dataset(attrs=flat_attributes(attrs(Custom(0.0))))
    assert next(attribute_differences(attrs(Custom(1.0)), stored.attrs)) == (
        "patches[0].intervention is constant 1.0 in this run and constant 0.0 in the store"
    )
    own = attrs(Custom(lambda site, layer, base, source: base))
    assert "custom, without a version may be another function" in next(
        attribute_differences(own, own)
    )


# Analyses that no verb stores by itself: what they return can be stored all the same.
IN_MEMORY: dict[str, tuple[Callable[..., xr.Dataset], dict[str, Any], dict[str, Any]]] = {
    "edges": (
        edges,
        {},
        {
            "direction": ("noising", "direction is"),
            "intervention": ("zero", _BY),
            "steps": (2, "steps is 2 in this run and None in"),
            "rule": ("left", "rule is left in this run and gauss in"),
            "rtol": (0.1, "rtol is 0.1 in this run and 0.01 in"),
            "rules": ("relp", "rules is relp in this run and None in"),
            "positions": (True, "positions is True"),
        },
    ),
    "exact_edges": (
        exact_edges,
        {"edges": ["m0->logits"]},
        {
            "edges": (["m1->logits"], r"edges\[0\] is m1->logits in this run and m0->logits in"),
            "direction": ("noising", "direction is"),
            "intervention": ("zero", _BY),
            "positions": (True, "positions is True"),
            "tolerance": (0.1, "tolerance is 0.1 in this run and None in"),
        },
    ),
    "sublayers": (
        sublayers,
        {"runner": "packed"},
        {
            "which": ("corrupted", "direction is denoising"),
            "direction": ("denoising", "direction is denoising"),
            "runner": ("hooked", "runner is hooked in this run and packed in"),
            "max_tokens": (64, "max_tokens is 64 in this run and 4096 in"),
        },
    ),
}


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (kind, name)
        for kind, (analysis, _, _) in IN_MEMORY.items()
        for name in inspect.signature(analysis).parameters
        if name not in NO_NUMBER
    ],
)
def test_results_in_memory_say_every_argument(kind: str, argument: str, tmp_path: Path) -> None:
    analysis, arguments, own = IN_MEMORY[kind]
    cases = {**OTHERS, **own}
    assert argument in cases, f"say what a store of {kind} answers to another {argument}"
    other, words = cases[argument]

    def run(**more: Any) -> xr.Dataset:
        given = {**COMMON, **arguments, **more}
        return analysis(**{name: value_of(value) for name, value in given.items()})

    common = common_of(kind, argument)
    first = run(**common)
    second = run(**{**common, argument: other})
    expect_refusal(tmp_path / "a.zarr", first, first.attrs, second.attrs, words)
