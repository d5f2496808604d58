"""What a store is a store of: for each argument that can change a number, a store refuses a run in
which that argument alone differs, says so, and nothing runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.attribution import AtpStar, IntegratedInputs, IntegratedSite
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, DamagedError, StoreError
from patchsweep.spec.interventions import Custom, Mean
from patchsweep.spec.metrics import Metric
from patchsweep.store.attributes import attributes
from patchsweep.store.save import load_dataset
from patchsweep.store.store import Store
from patchsweep.sweeps import api
from patchsweep.sweeps.identity import sealed
from patchsweep.sweeps.screen_settings import Screen
from store_checks import checksums
from subjects import model, reference_pairs
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

NAME = "tiny:llama"
TEXT = "When {0} and {1} went to the shops, {2} {verb} a bottle of milk to"


@cache
def pairs(
    verb: str = "gave", second: str = "gave", answer: str = " Mary", label: str = "shops"
) -> PromptPairs:
    return PromptPairs.from_strings(
        model(NAME),
        clean=[
            TEXT.format("John", "Mary", "John", verb=verb),
            TEXT.format("Tom", "James", "Tom", verb=second),
        ],
        corrupted=[
            TEXT.format("John", "Mary", "Mary", verb=verb),
            TEXT.format("Tom", "James", "James", verb=second),
        ],
        answers=[(answer, " John"), (" James", " Tom")],
        labels=[{"place": label}, {"place": "shops"}],
    )


@cache
def edited() -> TransformerBridge:
    """The model with one column of one matrix set to zero."""
    bridge = ps.load_model(NAME, device="cpu")
    with torch.no_grad():
        bridge.original_model.get_parameter(weight_name(bridge, "layers.1", "down_proj"))[:, 5] = 0
    return bridge


@cache
def in_16_bits() -> TransformerBridge:
    return ps.load_model(NAME, device="cpu", dtype="bfloat16")


def weight_name(bridge: TransformerBridge, *parts: str) -> str:
    names = (name for name, _ in bridge.original_model.named_parameters())
    return next(name for name in names if all(part in name for part in parts))


SWEEP: dict[str, Any] = {
    "sites": ["z", "mlp_post"],
    "metrics": "logit_diff",
    "intervention": 0.0,
    "layers": [1],
    "positions": [15],
    "heads": [0],
    "neurons": [3, 4],
    "runner": "packed",
}
# arguments of a sweep that say where, by whom and how fast it is done
NO_NUMBER = {"store", "storage_options", "slice_index", "n_slices", "cache_budget", "progress"}
# argument -> another value, and what the refusal says
SWEEP_CASES: dict[str, tuple[Any, str]] = {
    "model": (edited, "the weights differ"),
    "pairs": (
        lambda: pairs(second="sold"),
        "the clean prompts and corrupted prompts differ, first in pair 1",
    ),
    "sites": (["q", "mlp_post"], "sites.q is only in this run"),
    "metrics": (["prob"], r"metrics\[0\] is prob in this run and logit_diff in the store"),
    "per_token": (True, "the length of metrics is 2 in this run and 1 in the store"),
    "direction": ("denoising", "direction is denoising in this run and noising in the store"),
    "intervention": (5.0, "intervention is constant 5.0 in this run and constant 0.0 in the store"),
    "tolerance": (0.01, "methods.exact.tolerance is only in this run"),
    "layers": ([2], "sites.z.layers is 2 in this run and 1 in the store"),
    "positions": ([16], "sites.z.positions is 16 in this run and 15 in the store"),
    "heads": ([1], "sites.z.heads is 1 in this run and 0 in the store"),
    "neurons": ([3, 5], r"sites.mlp_post.neurons is 3,5 in this run and 3\.\.4 in the store"),
    "read": (-2, "read is -2 in this run and -1 in the store"),
    "method": (["exact", "atp"], "methods.atp is only in this run"),
    "runner": ("hooked", "runner is hooked in this run and packed in the store"),
    "max_tokens": (64, "max_tokens is 64 in this run and 4096 in the store"),
    "precision": ("bf16", "precision is bf16 in this run and model in the store"),
    "compute_dtype": ("model", "compute_dtype is bfloat16 in this run and float32 in the store"),
    "config": ({"seed": 1}, "attrs.provenance.config.seed is only in this run"),
    "means_from": (
        lambda: PromptPairs((*reference_pairs(NAME), *pairs())),
        "intervention is mean over 6 prompts, [0-9a-f]+ in this run and mean over 4 prompts",
    ),
}
# what else such a run and the one before have in common
TOGETHER_WITH: dict[str, dict[str, Any]] = {
    "compute_dtype": {"model": lambda: in_16_bits()},
    "means_from": {"intervention": "mean", "means_from": lambda: reference_pairs(NAME)},
}


def value_of(given: Any) -> Any:
    """What a case holds, made now if it holds a function that makes it."""
    return given() if callable(given) else given


def sweep(store: Path | None, **more: Any) -> xr.Dataset:
    arguments = {"model": model(NAME), "pairs": pairs(), **SWEEP, **more}
    return ps.sweep(**arguments, store=store)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, lets everything that runs a model fail from then on."""

    def run(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("a model ran")

    def forbid() -> None:
        monkeypatch.setattr(api, "prepare_runner", run)
        monkeypatch.setattr("patchsweep.sweeps.executor.run_work", run)

    return forbid


@pytest.mark.parametrize(
    "argument", [name for name in inspect.signature(ps.sweep).parameters if name not in NO_NUMBER]
)
def test_store_refuses_a_sweep_in_which_one_argument_differs(
    argument: str, tmp_path: Path, nothing_runs: Callable[[], None]
) -> None:
    assert argument in SWEEP_CASES, f"say what a store answers to another {argument}"
    other, words = SWEEP_CASES[argument]
    store = tmp_path / "a.zarr"
    common = {name: value_of(value) for name, value in TOGETHER_WITH.get(argument, {}).items()}
    sweep(store, **common)
    before = checksums(store)
    nothing_runs()
    with pytest.raises(StoreError, match=f"belongs to another run: {words}"):
        sweep(store, **{**common, argument: value_of(other)})
    assert checksums(store) == before


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"answer": " Tom"}, "the answers differ, first in pair 0"),
        ({"label": "milk"}, "the labels differ, first in pair 0"),
        ({"verb": "sold"}, "the clean prompts and corrupted prompts differ, first in pair 0"),
    ],
)
def test_store_refuses_pairs_that_differ_in_one_thing(
    other: dict[str, str], words: str, tmp_path: Path
) -> None:
    # the label is no position of this sweep, and the word lies at no position of it
    sweep(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=words):
        sweep(tmp_path / "a.zarr", pairs=pairs(**other))


def test_store_refuses_other_tokens_of_the_same_words(tmp_path: Path) -> None:
    one = pairs()[0]
    at = next(i for i, (a, b) in enumerate(zip(one.clean, one.corrupted, strict=True)) if a != b)
    ids = list(one.clean)
    ids[at] += 1  # as of the second byte of an emoji: another id, the same replacement character
    other = PromptPairs((replace(one, clean=tuple(ids)),))
    sweep(tmp_path / "a.zarr", pairs=PromptPairs((one,)))
    with pytest.raises(StoreError, match="the clean prompts differ, first in pair 0"):
        sweep(tmp_path / "a.zarr", pairs=other)


@dataclass
class Scaled:
    """The base's values, scaled: an intervention of the user's own."""

    by: float
    name: str = "scaled"
    version: str | None = "1"
    from_source: bool = False
    default_direction: str = "noising"

    def prepare(self, prompts: Any, activations: Any) -> None: ...

    def values(self, site: Any, layer: int, base: Tensor, source: Tensor, spans: Any) -> Tensor:
        return base * self.by


def half(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
    return base / 2


def peak(logits: Tensor) -> Tensor:
    return logits[:, 0].max(dim=-1).values


INTERVENTIONS: dict[str, tuple[Any, Any, str]] = {
    "name": ("zero", "resample", "intervention is resample in this run and zero in the store"),
    "mean": (
        lambda: Mean(reference=reference_pairs(NAME)),
        lambda: Mean(per="all", reference=reference_pairs(NAME)),
        "intervention is mean_all over 4 prompts, [0-9a-f]+ in this run and mean over 4 prompts",
    ),
    "tensor": (
        torch.zeros(32),
        torch.ones(32),
        r"constant tensor \[32\] float32 .* in this",
    ),
    "from-source": (Custom(0.0), Custom(0.0, from_source=True), "from_source is True"),
    "version": (
        Custom(half, name="half", version="1"),
        Custom(half, name="half", version="2"),
        "intervention is half, version 2 in this run and half, version 1 in the store",
    ),
    "parameter": (
        Scaled(0.5),
        Scaled(2.0),
        "scaled, by=2.0, version 1 in this run and scaled, by=0.5",
    ),
}


@pytest.mark.parametrize("case", INTERVENTIONS)
def test_store_refuses_another_intervention(case: str, tmp_path: Path) -> None:
    first, other, words = INTERVENTIONS[case]
    common = {"sites": "z", "neurons": None, "heads": None, "direction": "noising"}
    first, other = (one() if type(one) is FunctionType else one for one in (first, other))
    sweep(tmp_path / "a.zarr", intervention=first, **common)
    sweep(tmp_path / "a.zarr", intervention=first, **common)
    with pytest.raises(StoreError, match=words):
        sweep(tmp_path / "a.zarr", intervention=other, **common)


METHODS: dict[str, tuple[Any, Any, str]] = {
    "ig": (IntegratedSite(n_steps=2), "ig", r"methods.ig.n_steps is 5 in this run and 2 in"),
    "ig_inputs": (
        IntegratedInputs(n_steps=2),
        IntegratedInputs(n_steps=3),
        "methods.ig_inputs",
    ),
    "drop": (AtpStar(), AtpStar(grad_drop=True), "methods.atp_star.grad_drop is True in this run"),
    **{
        f"screen-{f.name}": (
            Screen(k=2, subsets=8),
            replace(Screen(k=2, subsets=8), **{f.name: other}),
            rf"methods.screen.{f.name}",
        )
        for f, other in zip(
            fields(Screen), ["relp", 3, 0.5, 16, 0.3, 0.1, 7], strict=True
        )  # a new field of Screen fails here until it has another value
    },
}


@pytest.mark.parametrize("case", METHODS)
def test_store_refuses_other_settings_of_a_method(case: str, tmp_path: Path) -> None:
    first, other, words = METHODS[case]
    common = {"sites": "z", "neurons": None, "heads": None, "intervention": "resample"}
    sweep(tmp_path / "a.zarr", method=first, **common)
    with pytest.raises(StoreError, match=words):
        sweep(tmp_path / "a.zarr", method=other, **common)


# Functions of the user's own


UNVERSIONED: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metrics": peak}, "peak, without a version"),
    "lambda": ({"metrics": lambda logits: logits[:, 0, 0]}, "<lambda>, without a version"),
    "metric-object": ({"metrics": Metric.of_logits(peak, name="top")}, "top, without a version"),
    "named-as-ours": (
        {"metrics": Metric.of_logits(peak, name="logit_diff")},
        "logit_diff, without a version",
    ),
    "intervention": ({"intervention": half}, "custom, without a version"),
    "intervention-object": (
        {"intervention": Scaled(2.0, version=None)},
        "scaled, by=2.0, without a version",
    ),
}


@pytest.mark.parametrize("case", UNVERSIONED)
def test_function_without_a_version_is_refused_with_a_store_before_anything_runs(
    case: str, tmp_path: Path, nothing_runs: Callable[[], None]
) -> None:
    arguments, words = UNVERSIONED[case]
    assert "z" in sweep(None, **arguments)  # in memory it is nobody's business
    nothing_runs()
    with pytest.raises(ConfigError, match=f"{words}: a store must know which function"):
        sweep(tmp_path / "a.zarr", **arguments)
    assert not (tmp_path / "a.zarr").exists()


def test_metric_with_name_and_version_goes_on_and_another_version_does_not(tmp_path: Path) -> None:
    def run(version: str) -> xr.Dataset:
        return sweep(
            tmp_path / "a.zarr", metrics=Metric.of_logits(peak, name="top", version=version)
        )

    first = run("1").load()
    xr.testing.assert_identical(run("1").load(), first)
    with pytest.raises(StoreError, match=r"metrics\[0\] is top, version 2 in this run and top, v"):
        run("2")


def test_two_lambdas_in_one_call_have_the_names_that_they_are_given() -> None:
    metrics = [
        Metric.of_logits(lambda logits: logits[:, 0, 0], name="first"),
        Metric.of_logits(lambda logits: logits[:, 0, 1], name="second"),
    ]
    ds = sweep(None, metrics=metrics)
    assert list(ds["metric"].values) == ["first", "second"]
    assert not np.array_equal(ds["z"][0], ds["z"][1])
    with pytest.raises(ValueError, match=r"functions by Metric.of_logits\(function, name=...\)"):
        sweep(None, metrics=[lambda logits: logits[:, 0, 0], lambda logits: logits[:, 0, 1]])


# What else a store is known by


def test_digest_is_one_hash_of_all_parts(tmp_path: Path) -> None:
    sweep(tmp_path / "a.zarr")
    identity = Store.open(tmp_path / "a.zarr").attrs["identity"]
    assert identity == attributes(sweep(None))["identity"]  # in memory too
    parts = {key: value for key, value in identity.items() if key != "digest"}
    assert sealed(parts) == identity
    for key in parts:
        assert sealed({**parts, key: "another"})["digest"] != identity["digest"]


def test_store_goes_on_with_the_packed_size_that_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path / "whole.zarr", max_tokens=64)
    cut = tmp_path / "cut.zarr"
    with monkeypatch.context() as stopped:
        stopped.setattr("patchsweep.sweeps.executor.run_work", lambda *arguments: None)
        sweep(cut, max_tokens=64)
    assert Store.open(cut).pending()
    sweep(cut)
    assert Store.open(cut).attrs["identity"]["max_tokens"] == 64
    assert checksums(cut) == checksums(tmp_path / "whole.zarr")


def test_process_adopts_the_packed_size_of_a_store_that_another_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = api.prepare_runner

    def meanwhile(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(api, "prepare_runner", prepare)
        sweep(tmp_path / "a.zarr", max_tokens=64, slice_index=0, n_slices=2)
        return prepare(*arguments, **more)

    monkeypatch.setattr(api, "prepare_runner", meanwhile)
    sweep(tmp_path / "a.zarr")
    assert Store.open(tmp_path / "a.zarr").attrs["identity"]["max_tokens"] == 64


def test_store_of_an_older_format_is_read_by_xarray_and_says_in_one_line_why_it_does_not_go_on(
    tmp_path: Path, nothing_runs: Callable[[], None]
) -> None:
    store = tmp_path / "a.zarr"
    before = sweep(store).load()
    edit(store, "zarr.json", lambda attrs: attrs.update(patchsweep_store=1))
    edit(store, "progress/zarr.json", lambda attrs: attrs.pop("files"))
    found = xr.open_zarr(store, consolidated=False)
    xr.testing.assert_equal(found.load(), before)
    assert ps.summary.largest(found, "z")
    nothing_runs()
    with pytest.raises(StoreError) as caught:
        sweep(store)
    assert str(caught.value) == (
        f"{store} has store format 1, and this patchsweep reads 2; xarray.open_zarr reads it as it "
        "is, and so does the version that wrote it; give another path to run again"
    )


def edit(store: Path, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change attributes of one of a store's groups."""
    root = store / key
    metadata = json.loads(root.read_text())
    change(metadata["attributes"])
    root.write_text(json.dumps(metadata))


@pytest.mark.parametrize("identity", ['"nobody"', "[]", '{"max_tokens": "many"}', '{"model": 3}'])
def test_spoilt_identity_is_damage_that_the_same_run_mends(identity: str, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    sweep(store)
    before = checksums(store)
    edit(store, "zarr.json", lambda attrs: attrs.update(identity=identity))
    with pytest.raises(DamagedError, match=r"zarr\.json: is not as it was written"):
        Store.open(store)
    with pytest.raises(DamagedError, match=r"zarr\.json: is not as it was written"):
        sweep(store, layers=[0])
    sweep(store)
    assert checksums(store) == before


def test_means_of_edited_weights_are_taken_anew(tmp_path: Path) -> None:
    bridge = ps.load_model(NAME, device="cpu")
    store = tmp_path / "a.zarr"
    common = {"model": bridge, "intervention": "mean_all", "layers": [2], "heads": None}
    sweep(store, **common)
    bridge.original_model.get_parameter(weight_name(bridge, "layers.1", "o_proj")).data.mul_(2)
    store.rename(tmp_path / "old.zarr")
    xr.testing.assert_equal(sweep(store, **common).load(), sweep(None, **common))


def test_hook_point_of_a_site_is_no_estimate_of_it() -> None:
    ds = ps.sweep(model(NAME), pairs(), ["embed", "embed.hook_out"], runner="hooked")
    assert ps.summary.sites(ds) == ("embed", "embed_hook_out")
    assert ps.summary.estimates(ds) == {}
    # a patch of all positions is one number for each pair, as the unpatched metrics are
    one = ps.sweep(model(NAME), pairs(), ["embed.hook_out"], positions="all")
    assert ps.summary.sites(one) == ("embed_hook_out",)


def test_estimates_say_whose_they_are_and_whether_they_have_a_sign() -> None:
    method = AtpStar(name="dropped", grad_drop=True)
    ds = ps.sweep(model(NAME), pairs(), "z", method=["exact", "atp", method])
    assert ps.summary.estimates(ds) == {"z_atp": ("z", "atp"), "z_dropped": ("z", "dropped")}
    assert ps.summary.is_absolute(ds, "z_dropped")
    assert not ps.summary.is_absolute(ds, "z_atp")


def test_variables_without_roles_go_by_their_names() -> None:
    ds = ps.sweep(model(NAME), pairs(), "z", method=["exact", "atp"])
    for name in ds.data_vars:
        ds[name].attrs.clear()
    assert ps.summary.sites(ds) == ("z",)
    assert ps.summary.estimates(ds) == {"z_atp": ("z", "atp")}


def test_old_results_of_an_analysis_say_that_they_are_old(tmp_path: Path) -> None:
    old = xr.Dataset({"x": ("i", np.zeros(2))}, attrs={"kind": "lens", "patchsweep_version": "0.1"})
    old.to_zarr(tmp_path / "old.zarr", zarr_format=3, consolidated=False)
    for read in (ps.open_store, lambda place: load_dataset(place, {"kind": "lens"})):
        with pytest.raises(StoreError, match=r"store format 1, .* xarray.open_zarr reads it as it"):
            read(tmp_path / "old.zarr")
