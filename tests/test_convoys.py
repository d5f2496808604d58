"""Sites that share packed batches: the same numbers as alone, and the same bytes whoever computes
them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models import TINY_FAMILIES
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec import shards
from patchsweep.spec.batch import make_batches
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.shards import site_groups_of
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.layout import Unit
from patchsweep.store.store import Store
from patchsweep.sweeps.api import prepare_runner
from patchsweep.sweeps.bf16 import RecheckedWork, recheck_variables
from patchsweep.sweeps.exact import ExactWork
from patchsweep.sweeps.executor import Quiet, Slice, run_work, work_items_of
from patchsweep.sweeps.layout import make_layout
from store_checks import checksums
from subjects import demo_pairs, model
from test_sweep import mixed_pairs

NAME = "tiny:llama"
SMALL_UNITS = 300  # two pairs of the mixed ones; resid_pre and mlp_out together, z alone
METRIC = (METRICS["logit_diff"],)
# fp32 logits of order 10, in batches of another shape
TOLERANCE = 1e-4


def _sites_of(family: str) -> list[str]:
    """Every site that packed batches can patch there without choosing neurons."""
    found, unwrapped = [], PackedRunner(model(f"tiny:{family}"), ()).unwrapped
    for name, site in SITES.items():
        try:
            resolve_site(unwrapped, site)
        except (Unsupported, KeyError):
            continue
        if site.unit != "neuron":
            found.append(name)
    return found


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_all_sites_in_common_packed_batches_equal_each_alone(family: str) -> None:
    name = f"tiny:{family}"
    sites = [site for site in _sites_of(family) if site != "pattern_cell"]
    assert len(sites) > 5
    request = make_request(model(name), demo_pairs(name), SweepSpec(sites))
    (batch,) = make_batches(request.pairs, [0], request.direction, -1, torch.device("cpu"))
    runner = PackedRunner(model(name), request.sites, max_tokens=150)  # several packed batches
    loaded = runner.load(batch, request.intervention)
    rng = np.random.default_rng(0)
    sets = []
    for plan in request.plans:
        live = plan.live_patches()
        sets.append(PatchSet(plan, rng.choice(live, min(12, len(live)), replace=False)))
    null = [PatchSet(s.plan, np.concatenate([s.patches[:4], s.patches[:1]])) for s in sets]
    base = float(runner.references(loaded, METRIC)[0])
    found = runner.run_together(loaded, sets, METRIC, null)
    largest = 0.0
    for chosen, together in zip(sets, found, strict=False):
        alone = runner.run(loaded, chosen.plan, chosen.patches, METRIC)
        largest = max(largest, float((alone - base).abs().max()))
        torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)
    assert largest > 0.05
    for chosen, together in zip(null, found[len(sets) :], strict=True):
        assert together.shape == (1, len(chosen.patches))
        (alone,) = runner.run_together(loaded, [], METRIC, [chosen])
        torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)
        assert float((together - base).abs().max()) < 0.5  # a bit of sixteen


@pytest.mark.parametrize("max_tokens", [4096, 60])
@pytest.mark.parametrize(
    ("layers", "sites"),
    [
        ([[0, 1], 2], ["mlp_post", "k", "z", "embed", "resid_post", "q"]),
        ([1, 2], ["mlp_post", "pattern_cell", "v", "pattern", "resid_mid"]),
    ],
    ids=["joint layers", "patterns"],
)
def test_mixed_pairs_and_sites_of_every_kind_share_packed_batches(
    max_tokens: int, layers: list, sites: list[str]
) -> None:
    """Against the hooked runner; pairs of several lengths, layers and neurons patched together."""
    asked = {"neurons": [0, [3, 5]], "layers": layers, "positions": [10, 12, 13]}
    found = [
        ps.sweep(model(NAME), mixed_pairs(), sites, runner=runner, max_tokens=max_tokens, **asked)
        for runner in ("packed", "hooked")
    ]
    for site in sites:
        effect = found[1][site] - found[1].base_metric
        assert float(abs(effect).max()) > 1e-3, site
        np.testing.assert_allclose(found[0][site], found[1][site], atol=TOLERANCE, err_msg=site)


def test_hooked_sites_stay_units_of_their_own() -> None:
    request = make_request(model(NAME), demo_pairs(NAME), SweepSpec(["resid_pre", "mlp_out"]))
    choice = prepare_runner(request, "hooked", None)
    units = [u for variable in make_layout(request, choice, {}).variables for u in variable.units()]
    assert len(work_items_of([ExactWork(request, choice.runner)], units)) == len(units) == 2


def test_small_sites_travel_together_and_large_ones_alone() -> None:
    whole = make_request(
        model(NAME), demo_pairs(NAME), SweepSpec(["resid_pre", "z", "attn_out", "mlp_out"])
    )
    assert set(site_groups_of(whole.plans).values()) == {0}
    tokens = [int(plan.suffix[plan.live_patches()].sum()) for plan in whole.plans]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "UNIT_TOKENS", tokens[1] + 1)
        assert site_groups_of(whole.plans) == {"attn_out": 0, "mlp_out": 0, "resid_pre": 0, "z": 1}
        assert site_groups_of(whole.plans[::-1]) == site_groups_of(whole.plans)
        patch.setattr(shards, "UNIT_TOKENS", tokens[0] + 1)  # z is cut into blocks of layers
        assert sorted(site_groups_of(whole.plans).values()) == [0, 1, 2, 3]


@pytest.mark.parametrize("precision", ["model", "bf16"])
def test_missing_units_are_made_again_in_the_same_company(tmp_path: Path, precision: str) -> None:
    def sweep(path: Path, **options) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "UNIT_TOKENS", SMALL_UNITS)
            ps.sweep(
                model(NAME), mixed_pairs(), ["resid_pre", "z", "mlp_out"], runner="packed",
                precision=precision, store=path, **options,
            )  # fmt: skip

    sweep(tmp_path / "whole.zarr")
    whole = checksums(tmp_path / "whole.zarr")
    with Store.open(tmp_path / "whole.zarr") as store:
        units, variables = store.units(), store.variables
    assert len({unit.pair_block for unit in units}) > 1
    assert len({unit.variable for unit in units}) == (3 if precision == "model" else 9)
    for index in range(2):
        sweep(tmp_path / "shared.zarr", slice_index=index, n_slices=2)
    assert checksums(tmp_path / "shared.zarr") == whole
    for unit in units:
        variable = variables[unit.variable]
        for key in (variable.shard_key(unit), variable.flag_key(unit)):
            (tmp_path / "whole.zarr" / key).unlink()
        assert checksums(tmp_path / "whole.zarr") != whole
        sweep(tmp_path / "whole.zarr")
        assert checksums(tmp_path / "whole.zarr") == whole, unit.name


def test_every_unit_has_one_bundle_and_a_proof_stays_together() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "UNIT_TOKENS", SMALL_UNITS)
        request = make_request(model(NAME), mixed_pairs(), SweepSpec(["resid_pre", "z", "mlp_out"]))
        choice = RunnerChoice(PackedRunner(request.bridge, request.sites), "", None)
        work = RecheckedWork(request, choice)
        units = [unit for variable in recheck_variables(request) for unit in variable.units()]
        bundles = work_items_of([work], units)
    covered = [unit for bundle in bundles for unit in bundle.units]
    assert sorted(unit.name for unit in covered) == sorted(unit.name for unit in units)
    for bundle in bundles:
        names = (unit.variable for unit in bundle.units)
        sites = {name.removesuffix("_bf16").removesuffix("_noise") for name in names}
        assert sites in ({"z"}, {"resid_pre", "mlp_out"})
        assert {unit.variable for unit in bundle.units} == {
            site + end for site in sites for end in ("_bf16", "_noise")
        }
        assert len({unit.pair_block for unit in bundle.units}) == 1


def test_a_bundle_whose_first_unit_is_held_is_left_to_its_holder(
    tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "run.zarr"
    ps.sweep(model(NAME), demo_pairs(NAME), ["resid_pre", "mlp_out"], runner="packed", store=path)
    whole = checksums(path)
    request = make_request(model(NAME), demo_pairs(NAME), SweepSpec(["resid_pre", "mlp_out"]))
    work = ExactWork(request, PackedRunner(request.bridge, request.sites))
    with Store.open(path) as ours, Store.open(path) as theirs:
        (bundle,) = work_items_of([work], ours.units())
        assert len(bundle.units) == 2
        for unit in bundle.units:
            variable = ours.variables[unit.variable]
            (path / variable.shard_key(unit)).unlink()
            (path / variable.flag_key(unit)).unlink()
        assert theirs.claim(bundle.units[:1]) == [bundle.units[0]]
        computed: list[tuple[Unit, ...]] = []
        inner = work.start
        monkeypatch.setattr(work, "start", lambda units: computed.append(units) or inner(units))

        class HandOver(Quiet):
            def waiting(self, n_units: int, holders: object) -> None:
                assert n_units == 2
                assert not computed  # the second unit was free, its work item was not
                theirs.release(bundle.units)

        monkeypatch.setattr("patchsweep.sweeps.executor.WAIT_S", 0.0)
        run_work([work], ours, HandOver(), Slice())
    assert len(computed) == 1
    assert checksums(path) == whole
