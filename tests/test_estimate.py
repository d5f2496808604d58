"""A plan prices what will run: exact patches, estimates, screens, bf16, hooked runs, slices."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
from patchsweep.cli import main
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.cost import Cost
from patchsweep.sweeps.executor import Quiet
from patchsweep.sweeps.screen_settings import Screen
from subjects import demo_pairs, model

SITES = ["resid_pre", "z"]


class Total(Quiet):
    """Keeps the token-layers that a run says it has."""

    def begin(self, n_units: int, total: int, done: int) -> None:
        self.total = total


def cost(**settings: Any) -> Cost:
    return ps.plan(model("tiny:llama"), demo_pairs("tiny:llama"), SITES, **settings)


@pytest.mark.parametrize(
    "method",
    ["exact", "atp", ["exact", "atp", "relp"], "ig", Screen(k=5), Screen(k=5, subsets=0)],
    ids=str,
)
def test_plan_costs_what_the_run_says(method: Any) -> None:
    progress = Total()
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    ds = ps.sweep(bridge, pairs, SITES, method=method, progress=progress, runner="packed")
    found = cost(method=method)
    assert found.token_layers == pytest.approx(progress.total, abs=len(SITES))
    named = attributes(ds).get("attribution", {})
    assert {p.name: p.token_layers for p in found.parts if p.name in named} == {
        name: one["token_layers"] for name, one in named.items()
    }
    assert found.result_bytes == sum(
        4 * ds[name].size for name in ds if name not in ("base_metric", "source_metric")
    )


def test_estimates_run_no_patch_exactly() -> None:
    found = cost(method="atp")
    assert [site.n_exact for site in found.sites] == [0, 0]
    assert [site.token_layers for site in found.sites] == [0, 0]
    assert (found.n_batches, found.n_captures) == (0, 0)
    assert 0 < found.token_layers < cost().token_layers
    assert found.flops / found.token_layers == cost().flops / cost().token_layers


def test_hooked_patches_are_whole_forward_passes() -> None:
    found = cost(runner="hooked")
    assert found.token_layers == sum(17 * 3 * site.n_live for site in found.sites)
    assert found.n_batches == 0
    assert found.token_layers > cost(runner="packed").token_layers


def test_bf16_runs_some_patches_again() -> None:
    low, exact = cost(precision="bf16"), cost()
    (again,) = low.parts
    assert again.token_layers > 0
    assert low.sites == exact.sites
    assert low.result_bytes > 2 * exact.result_bytes


def test_slices_share_what_one_process_would_run() -> None:
    found = cost(slice_index=1, n_slices=4)
    assert found.n_slices == 4
    assert found.token_layers == cost().token_layers


def test_plan_takes_every_argument_of_sweep(tmp_path: Path) -> None:
    names = [*inspect.signature(ps.sweep).parameters][4:]
    defaults = {name: inspect.signature(ps.sweep).parameters[name].default for name in names}
    assert cost(**defaults).token_layers == cost().token_layers
    assert cost(store=tmp_path / "a.zarr", storage_options={}, config={"a": 1})
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        cost(layer=[1])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method=atp"], ["atp", "0"]),
        (["method=screen", "method.k=5"], ["atp", "bound on the rest"]),
        (["precision=bf16"], ["again in fp32"]),
        (["slice=1", "n_slices=4"], ["1 of 4: about"]),
        (["runner=hooked"], ["run exactly"]),
        (["tolerance=0.01"], ["the most that it can take"]),
        (["tolerance=1%", "sample=true"], ["1%: estimate from", "patches run both ways: about"]),
    ],
    ids=lambda words: words[0],
)
def test_plan_says_what_will_run(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "model=tiny", "task=ioi_demo", "sites=[resid_pre,z]", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines may be wrapped
    assert all(part in out for part in parts)
