"""What attribution refuses, before any forward pass, and with the remedy in the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import patchsweep as ps
import pytest
import torch
from attribution_setup import pairs_of
from patchsweep.attribution import METHODS, IntegratedInputs, IntegratedSite
from patchsweep.attribution.check import check_model
from patchsweep.errors import MethodError, PatchsweepError
from patchsweep.sweeps.screen_settings import Screen
from subjects import model

NAME = "tiny:llama"


@contextmanager
def no_forward() -> Iterator[None]:
    """Fails if the model runs inside."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a forward pass ran before the mistake was told")

    with mock.patch.object(type(model(NAME).original_model), "forward", refuse):
        yield


def _refused(match: str, **arguments: object) -> None:
    options = {"sites": ["z"], "metrics": "logit_diff", **arguments}
    with no_forward(), pytest.raises(PatchsweepError, match=match):
        ps.sweep(model(NAME), pairs_of(NAME, 1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["kl_base", "tv_base"])
@pytest.mark.parametrize("method", [m for m, make in METHODS.items() if make().at_base])
def test_metric_flat_at_base_is_refused_naming_the_remedy(metric: str, method: str) -> None:
    _refused("logit_diff.*ig", metrics=metric, method=method)


@pytest.mark.parametrize("metric", ["rank", "top1_change"])
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_metric_that_jumps_is_refused(metric: str, method: str) -> None:
    _refused("jumps.*logit_diff", metrics=metric, method=method)


def test_users_metric_without_gradient_is_refused() -> None:
    def argmax(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].argmax(dim=-1).float()

    _refused("no gradient", metrics=argmax, method="atp")


def test_users_metric_with_gradient_is_taken() -> None:
    def peak(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].amax(dim=-1)

    ds = ps.sweep(model(NAME), pairs_of(NAME, 1), ["z"], peak, method="atp")
    assert float(abs(ds.z_atp).max()) > 0


def test_training_mode_is_refused() -> None:
    bridge = model(NAME)
    bridge.train()
    try:
        _refused(r"training mode.*model\.eval\(\)", method="atp")
    finally:
        bridge.eval()


def test_quantised_weights_are_refused() -> None:
    quantised = torch.nn.Linear(4, 4)
    quantised.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    fake = SimpleNamespace(original_model=quantised)
    with pytest.raises(MethodError, match=r"int8.*dtype=bfloat16"):
        check_model(fake)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [IntegratedSite, IntegratedInputs])
def test_zero_steps_are_refused(method: type) -> None:
    with pytest.raises(MethodError, match="steps=0"):
        method(0)


def test_unknown_method_is_refused_with_the_list() -> None:
    _refused("'gradients' is not known.*atp_star", method="gradients")


def test_no_method_and_two_of_a_name_are_refused() -> None:
    _refused("empty", method=[])
    _refused("twice", method=["atp", "atp"])


def test_layers_together_are_refused() -> None:
    _refused("each layer by itself", method="atp", layers=[(0, 1)])


def test_ig_inputs_without_a_source_is_refused() -> None:
    _refused("no source prompt", method="ig_inputs", intervention="zero")


def test_relp_ah_on_queries_is_refused() -> None:
    _refused("relp or atp_star", method="relp_ah", sites=["q"])


def test_atp_star_refuses_a_value_that_rotary_would_change() -> None:
    # told once the model's blocks are known: what stands around them has run by then
    with pytest.raises(PatchsweepError, match="rot_q"):
        ps.sweep(model(NAME), pairs_of(NAME, 1), ["q"], method="atp_star", intervention=1.0)
    ds = ps.sweep(model(NAME), pairs_of(NAME, 1), ["rot_q"], method="atp_star", intervention=1.0)
    assert float(abs(ds.rot_q_atp_star).max()) > 0


def test_screen_with_k_larger_than_the_plan_is_refused() -> None:
    _refused(r"k=1000.*use k <= \d+", method=Screen(k=1000))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"subsets": 3}, {"inclusion": 1.0}, {"alpha": 0.7}, {"margin": -1.0}]
)
def test_screen_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=next(iter(wrong))):
        Screen(**wrong)  # type: ignore[arg-type]


def test_screen_stands_alone() -> None:
    _refused("stands alone", method=["screen", "atp"])


def test_screen_in_slices_is_refused(tmp_path) -> None:
    _refused("one process", method=Screen(k=5), n_slices=2, store=tmp_path / "s.zarr")
