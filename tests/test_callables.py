"""Metrics and interventions of the user's own: what they see, and what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.circuits import edges, exact_edges
from patchsweep.analyses.logit_lens import Patch, lens
from patchsweep.errors import ConfigError, MetricError
from patchsweep.spec.interventions import Custom, Mean, Resample, Zero, values_of
from patchsweep.spec.metrics import Logits, Metric
from patchsweep.spec.sites import SITES
from subjects import CLEAN, CORRUPTED, model
from torch import Tensor

NAME = "tiny:llama"
FEW: dict[str, Any] = {"layers": [1], "positions": [9, 16]}
RUNNERS = ["hooked", "packed"]


def three_pairs() -> ps.PromptPairs:
    other = [text.replace("milk", "drink").replace("shops", "park") for text in (CLEAN, CORRUPTED)]
    third = [text.replace("John", "Paul") for text in (CLEAN, CORRUPTED)]
    return ps.PromptPairs.from_strings(
        model(NAME),
        clean=[CLEAN, other[0], third[0]],
        corrupted=[CORRUPTED, other[1], third[1]],
        answers=[(" Mary", " John"), (" Mary", " John"), (" Mary", " Paul")],
    )


def first_pair() -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        model(NAME), clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )


# metrics


def answer(logits: Tensor) -> Tensor:
    return logits[:, 0, 7]


def spoil(logits: Tensor) -> Tensor:
    """The same number, and everything that was given is lost."""
    value = logits[:, 0, 7].clone()
    logits.fill_(3.0)
    return value


def spoil_by_numpy(logits: Tensor) -> Tensor:
    value = logits[:, 0, 7].clone()
    logits.detach().numpy()[:] = 3.0  # unseen by autograd's version counter
    return value


def spoil_all(x: Logits) -> Tensor:
    value = x.answer[:, 0].clone()
    for given in (x.answer, x.wrong, x.full, x.base, x.source):
        assert given is not None
        given.zero_()
    return value


SPOILERS: dict[str, Callable[[Tensor], Tensor] | Metric] = {
    "torch": spoil,
    "numpy": spoil_by_numpy,
    "metric": Metric("spoil", "", "references", spoil_all),
}


@pytest.mark.parametrize("kind", SPOILERS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_metric_that_writes_into_its_input_changes_no_other(runner: str, kind: str) -> None:
    options = {"runner": runner, "sites": "z", **FEW}
    alone = ps.sweep(model(NAME), three_pairs(), metrics=["kl_base", "logit_diff"], **options)
    beside = ps.sweep(
        model(NAME),
        three_pairs(),
        metrics=[SPOILERS[kind], "kl_base", "logit_diff"],
        **options,
    )
    for name in ("z", "base_metric", "source_metric"):
        for metric in ("kl_base", "logit_diff"):
            found, expected = (ds[name].sel(metric=metric).values for ds in (beside, alone))
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["atp", "relp", "ig_inputs"])
def test_a_metric_that_writes_into_its_input_has_its_gradient(method: str) -> None:
    pairs = three_pairs()
    clean = ps.sweep(model(NAME), pairs, "z", answer, method=method, **FEW)
    spoilt = ps.sweep(model(NAME), pairs, "z", spoil, method=method, **FEW)
    np.testing.assert_allclose(spoilt[f"z_{method}"], clean[f"z_{method}"], atol=1e-6)
    assert float(abs(clean[f"z_{method}"]).max()) > 1e-3


def mixing(logits: Tensor) -> Tensor:
    return logits[:, 0, 7] - logits[:, 0, 7].mean()


def scalar(logits: Tensor) -> Tensor:
    return logits[:, 0, 7].mean()


def of_another_vocabulary(logits: Tensor) -> Tensor:
    return logits[:, 0, 10**6]


def numbers(logits: Tensor) -> Any:
    return logits[:, 0, 7].tolist()


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (mixing, "other rows"),
        (scalar, r"shape \(\).*\[row\]"),
        (of_another_vocabulary, r"failed on logits.*IndexError"),
        (numbers, r"shape list.*\[row\]"),
    ],
)
@pytest.mark.parametrize("call", [ps.sweep, ps.plan, edges])
def test_a_metric_that_is_none_is_refused_before_the_model_runs(
    call: Any, metric: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, pairs = model(NAME), first_pair()
    monkeypatch.setattr(type(bridge.original_model), "forward", None)
    with pytest.raises(MetricError, match=words):
        call(bridge, pairs, metrics=metric)


# interventions


def nudge(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
    return base + 0.5 * source.flip(-1)


def nudge_in_place(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
    source.copy_(source.flip(-1))
    return base.add_(source, alpha=0.5)


def mean_of_all(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
    """What mixes pairs if it is given several."""
    return base.mean(dim=(0, 1), keepdim=True).expand_as(base)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("site", ["resid_pre", "z", "pattern", "mlp_out"])
def test_values_made_in_place_change_nothing_else(runner: str, site: str) -> None:
    options = {"runner": runner, **FEW, "direction": "noising"}
    sites = [site, "resid_post"]
    clean = ps.sweep(model(NAME), three_pairs(), sites, intervention=nudge, **options)
    spoilt = ps.sweep(model(NAME), three_pairs(), sites, intervention=nudge_in_place, **options)
    for name in ("base_metric", "source_metric", *sites):
        np.testing.assert_allclose(spoilt[name], clean[name], atol=1e-5)
    assert float(abs(clean[site] - clean["base_metric"]).max()) > 1e-2


@pytest.mark.parametrize("runner", RUNNERS)
def test_values_of_a_pair_do_not_depend_on_the_pairs_beside_it(runner: str) -> None:
    options: dict[str, Any] = {"runner": runner, "sites": ["z", "mlp_out"], **FEW}
    together = ps.sweep(model(NAME), three_pairs(), intervention=mean_of_all, **options)
    alone = ps.sweep(model(NAME), first_pair(), intervention=mean_of_all, **options)
    for name in ("z", "mlp_out"):
        np.testing.assert_allclose(together[name][:, :1], alone[name], atol=1e-5)


def test_estimates_and_edges_ask_pair_by_pair_too() -> None:
    options: dict[str, Any] = {"intervention": mean_of_all, "direction": "noising"}
    estimates = [
        ps.sweep(model(NAME), pairs, "z", method="atp", **options, **FEW)["z_atp"].values
        for pairs in (three_pairs(), first_pair())
    ]
    np.testing.assert_allclose(estimates[0][:, :1], estimates[1], atol=1e-5)
    chosen = ["m0->logits", "a0.h1->m1"]
    runs = [
        exact_edges(model(NAME), pairs, chosen, **options)["edge"].values
        for pairs in (three_pairs(), first_pair())
    ]
    np.testing.assert_allclose(runs[0][:, :1], runs[1], atol=1e-5)


def test_the_lens_asks_pair_by_pair_too() -> None:
    patch = Patch("z", 1, intervention=mean_of_all)
    runs = [lens(model(NAME), pairs, patch=patch) for pairs in (three_pairs(), first_pair())]
    found = [ds["answer_log_prob"].sel(run="patched").values for ds in runs]
    np.testing.assert_allclose(found[0][:1], found[1], atol=1e-5)


WRONG: dict[str, Any] = {
    "one vector": lambda site, layer, base, source: base[0, 0],
    "no pair axis": lambda site, layer, base, source: base[0],
    "a number": lambda site, layer, base, source: 0.0,
    "kept axis": lambda site, layer, base, source: base.mean(dim=1, keepdim=True),
    "constant for each pair": torch.zeros(3, 17, 32),
    "constant of another width": torch.zeros(31),
    "constant for other positions": torch.zeros(16, 32),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", WRONG)
def test_values_of_another_shape_are_refused(runner: str, kind: str) -> None:
    rule = "is a constant" if "constant" in kind else "gave values"
    with pytest.raises(ConfigError, match=rf"intervention=custom {rule} of the shape .*z"):
        ps.sweep(model(NAME), first_pair(), "z", intervention=WRONG[kind], runner=runner, **FEW)


@pytest.mark.parametrize("shape", [(), (32,), (17, 32), (1, 32), (17, 1)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_constants_are_numbers_vectors_or_one_vector_a_position(
    runner: str, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(shape, generator=generator)
    ds = ps.sweep(model(NAME), three_pairs(), "z", intervention=constant, runner=runner, **FEW)

    def put(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return torch.broadcast_to(constant, base.shape)

    expected = ps.sweep(model(NAME), three_pairs(), "z", intervention=put, runner=runner, **FEW)
    np.testing.assert_array_equal(ds["z"], expected["z"])


@pytest.mark.parametrize("intervention", [Resample(), Zero(), Mean(), Custom(2.0)])
def test_values_have_the_shape_and_dtype_of_the_base(intervention: Any) -> None:
    base = torch.randn(3, 5, 4).to(torch.bfloat16)
    if isinstance(intervention, Mean):
        intervention._means = {("z", 0, 5): torch.randn(5, 4).double()}
    values = values_of(intervention, SITES["z"], 0, base, base.flip(0), [{}] * 3)
    assert values.shape == base.shape
    assert values.dtype == base.dtype
