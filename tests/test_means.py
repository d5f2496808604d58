"""Means kept beside a store: taken once, checked before they are read, never torn."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.batch import clean_prompts
from patchsweep.errors import StoreError
from patchsweep.hooked import HookedRunner
from patchsweep.interventions import Mean, Reader
from patchsweep.means import MeansFolder, check_means, keep_means
from patchsweep.request import make_request
from patchsweep.store import Store
from patchsweep.store.check import checksums, verify_structure
from subjects import model
from torch import Tensor

NAME = "tiny:llama"
SITES = ["z", "mlp_out"]
NAMES = [("John", "Mary"), ("Tom", "James"), ("Paul", "Mark")]


def pairs(verb: str = "gave") -> ps.PromptPairs:
    text = f"When {{0}} and {{1}} went to the shops, {{2}} {verb} a bottle of milk to"
    return ps.PromptPairs.from_strings(
        model(NAME),
        clean=[text.format(a, b, a) for a, b in NAMES],
        corrupted=[text.format(a, b, b) for a, b in NAMES],
        answers=[(f" {b}", f" {a}") for a, b in NAMES],
        labels=[{"giver": f"shops, {a}"} for a, _ in NAMES],
    )


def sweep(store: Path | None, intervention: Any = "mean", **more: Any) -> xr.Dataset:
    arguments = {"layers": [0, 2], "positions": [11, 15], **more}
    return ps.sweep(
        model(NAME), pairs(), SITES, store=store, intervention=intervention, **arguments
    )


def kept(store: Path) -> list[str]:
    return sorted(path.name for path in store.with_name(store.name + ".means").iterdir())


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts whose activations a hooked runner was asked for, call by call."""
    seen: list[int] = []
    plain = HookedRunner.activations

    def count(self: HookedRunner, tokens: Tensor) -> Any:
        seen.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(HookedRunner, "activations", count)
    return seen


@pytest.mark.parametrize("intervention", ["mean", "mean_all", "mean_label"])
def test_second_run_takes_no_means_and_gives_the_same_bytes(
    intervention: str, tmp_path: Path, forwards: list[int]
) -> None:
    first, other = tmp_path / "a.zarr", tmp_path / "b.zarr"
    sweep(first, intervention)
    assert forwards == [3]
    # a store that is begun afresh beside the means of the one before
    whole = checksums(first)
    first.rename(tmp_path / "old.zarr")
    sweep(first, intervention)
    sweep(first, intervention)
    assert forwards == [3]
    assert checksums(first) == whole
    sweep(other, intervention)
    assert forwards == [3, 3]
    assert checksums(other) == whole
    assert verify_structure(Store.open(first)) == []


def test_kept_means_are_those_of_a_run_without_a_store(tmp_path: Path) -> None:
    methods = ["exact", "atp", "atp_star"]
    for _ in range(2):  # taken, then read
        stored = sweep(tmp_path / "a.zarr", method=methods).load()
    xr.testing.assert_equal(stored, sweep(None, method=methods))
    # the runner and attribution may take a site at different places: each keeps its own
    assert [name.split("-")[0] for name in kept(tmp_path / "a.zarr")] == ["attribution", "hooked"]


@pytest.mark.parametrize("runner", ["wave", "hooked"])
def test_slices_share_means(runner: str, tmp_path: Path) -> None:
    sweep(tmp_path / "whole.zarr", runner=runner)
    for index in range(2):
        sweep(tmp_path / "cut.zarr", runner=runner, slice_index=index, n_slices=2)
    assert checksums(tmp_path / "cut.zarr") == checksums(tmp_path / "whole.zarr")
    assert len(kept(tmp_path / "cut.zarr")) == 1


def test_other_prompts_and_weights_take_their_own(tmp_path: Path, forwards: list[int]) -> None:
    store = tmp_path / "a.zarr"
    bridge = ps.load_model(NAME, device="cpu")

    def run(chosen: ps.PromptPairs, **more: Any) -> None:
        """A run of a new store at the old one's place."""
        shutil.rmtree(store, ignore_errors=True)
        ps.sweep(bridge, chosen, "z", positions=[15], store=store, intervention="mean", **more)

    run(pairs())
    run(pairs("handed"))
    run(pairs(), runner="hooked")  # finds the first
    assert forwards == [3, 3]
    with torch.no_grad():
        bridge.original_model.get_input_embeddings().weight.mul_(2)
    run(pairs())
    assert forwards == [3, 3, 3]
    assert len(kept(store)) == 3


def test_store_of_one_mean_refuses_another(tmp_path: Path) -> None:
    sweep(tmp_path / "a.zarr", "mean")
    with pytest.raises(StoreError, match="intervention"):
        sweep(tmp_path / "a.zarr", "mean_all")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-40])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "header":
        path.write_bytes(b"\xff" * 64)
    elif how == "value":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 0x40]) + data[-2:])
    elif how == "renamed":
        path.write_bytes(data.replace(b"mlp_out", b"mlp_xyz"))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "emptied", "header", "value", "renamed", "lost"])
def test_damaged_means_are_found_and_computed_anew(how: str, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    sweep(store)
    (name,) = kept(store)
    path = store.with_name("a.zarr.means") / name
    sound, values = path.read_bytes(), checksums(store)
    shutil.rmtree(store)  # else all is done, and nobody reads them
    damage(path, how)
    problems = check_means(store)
    assert problems == [] if how == "lost" else name in problems[0]
    sweep(store)
    assert path.read_bytes() == sound
    assert checksums(store) == values
    assert check_means(store) == []


def test_means_of_something_else_under_this_runs_name_are_refused(tmp_path: Path) -> None:
    store, other = tmp_path / "a.zarr", tmp_path / "b.zarr"
    sweep(store)
    sweep(other, "mean_all")
    ours, theirs = (s.with_name(f"{s.name}.means") / kept(s)[0] for s in (store, other))
    shutil.copy(theirs, ours)
    shutil.rmtree(store)
    with pytest.raises(StoreError, match=r"\(per differs.*delete it and run"):
        sweep(store)


def test_of_two_that_start_at_once_the_first_to_finish_counts(tmp_path: Path) -> None:
    request = make_request(model(NAME), pairs(), SITES, intervention="mean")
    prompts = clean_prompts(request.batches(range(3)), request.direction)
    reader = Reader("hooked", request.sites, lambda tokens: {})
    intervention = keep_means(request, tmp_path / "a.zarr", None).intervention
    assert isinstance(intervention, Mean)
    folder = intervention.kept
    assert isinstance(folder, MeansFolder)
    mine, theirs = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)

    def slow() -> dict[Any, Tensor]:
        """While these are computed, another process computes and writes its own."""
        found = replace(folder).get("position", prompts, reader, lambda: {("z", 0, 17): theirs})
        assert torch.equal(found["z", 0, 17], theirs)
        return {("z", 0, 17): mine}

    found = folder.get("position", prompts, reader, slow)
    assert torch.equal(found["z", 0, 17], theirs)
    assert len(kept(tmp_path / "a.zarr")) == 1


def test_kill_while_means_are_written_leaves_none(tmp_path: Path, forwards: list[int]) -> None:
    store = tmp_path / "a.zarr"
    child = os.fork()
    if child == 0:
        os.link = lambda *paths: os._exit(9)  # type: ignore[assignment]
        torch.set_num_threads(1)
        try:
            sweep(store)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (partial,) = kept(store)
    assert partial.endswith(".partial")
    sweep(store)
    assert forwards == [3]
    assert [name.endswith(".safetensors") for name in kept(store)] == [True]
