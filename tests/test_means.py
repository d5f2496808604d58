"""Means kept beside a store: taken once, checked before they are read, never torn."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import patchsweep.report.circuit
import patchsweep.report.edges
import patchsweep.report.heads
import patchsweep.report.lens
import pytest
import torch
import xarray as xr
from patchsweep import report
from patchsweep.analyses.circuits import circuit, edges
from patchsweep.analyses.heads import study
from patchsweep.analyses.logit_lens import Patch, lens
from patchsweep.errors import ConfigError, StoreError
from patchsweep.spec.batch import clean_prompts
from patchsweep.spec.interventions import Mean, Reader
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.store.store import Store
from patchsweep.sweeps.means import MeansFolder, check_means, keep_means
from store_checks import checksums, verify_structure
from subjects import model, reference_pairs
from torch import Tensor

NAME = "tiny:llama"
SITES = ["z", "mlp_out"]
NAMES = [("John", "Mary"), ("Tom", "James"), ("Paul", "Mark"), ("Anna", "Lucy")]


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
    """Prompts of which means were taken, to be kept beside a store, call by call."""
    seen: list[int] = []
    plain = MeansFolder.get

    def count(self: MeansFolder, per: str, prompts: Any, reader: Reader, compute: Any) -> Any:
        def counted() -> Any:
            seen.append(sum(len(group.tokens) for group in prompts))
            return compute()

        return plain(self, per, prompts, reader, counted)

    monkeypatch.setattr(MeansFolder, "get", count)
    return seen


@pytest.mark.parametrize("intervention", ["mean", "mean_all", "mean_label"])
def test_second_run_takes_no_means_and_gives_the_same_bytes(
    intervention: str, tmp_path: Path, forwards: list[int]
) -> None:
    first, other = tmp_path / "a.zarr", tmp_path / "b.zarr"
    sweep(first, intervention)
    assert forwards == [4]
    # a store that is begun afresh beside the means of the one before
    whole = checksums(first)
    first.rename(tmp_path / "old.zarr")
    sweep(first, intervention)
    sweep(first, intervention)
    assert forwards == [4]
    assert checksums(first) == whole
    sweep(other, intervention)
    assert forwards == [4, 4]
    assert checksums(other) == whole
    assert verify_structure(Store.open(first)) == []


def test_kept_means_are_those_of_a_run_without_a_store(tmp_path: Path) -> None:
    methods = ["exact", "atp", "atp_star"]
    for _ in range(2):  # taken, then read
        stored = sweep(tmp_path / "a.zarr", method=methods).load()
    xr.testing.assert_equal(stored, sweep(None, method=methods))
    # the runner and attribution may take a site at different places: each keeps its own
    assert [name.split("-")[0] for name in kept(tmp_path / "a.zarr")] == ["attribution", "packed"]


@pytest.mark.parametrize("runner", ["packed", "hooked"])
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
    run(pairs())  # finds the first
    assert forwards == [4, 4]
    with torch.no_grad():
        bridge.original_model.get_input_embeddings().weight.mul_(2)
    run(pairs())
    assert forwards == [4, 4, 4]
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
    request = make_request(model(NAME), pairs(), SweepSpec(SITES, intervention="mean"))
    prompts = clean_prompts(request.batches(range(4)), request.direction)
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
    assert forwards == [4]
    assert [name.endswith(".safetensors") for name in kept(store)] == [True]


# --- enough prompts behind each mean, and prompts of one's own ---


def pair_of(names: tuple[str, str] = ("John", "Mary"), place: str = "shops") -> ps.PromptPairs:
    a, b = names
    text = f"When {{}} and {{}} went to the {place}, {{}} gave a bottle of milk to"
    return ps.PromptPairs.from_strings(
        model(NAME),
        clean=[text.format(a, b, a)],
        corrupted=[text.format(a, b, b)],
        answers=[(f" {b}", f" {a}")],
        labels=[{"giver": f"{place}, {a}"}],
    )


def joined(*parts: ps.PromptPairs) -> ps.PromptPairs:
    return ps.PromptPairs(tuple(pair for part in parts for pair in part))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model(NAME).original_model), "forward", run)


@pytest.mark.parametrize(
    ("call", "intervention"),
    [
        (lambda given, **more: ps.sweep(model(NAME), given, "z", **more), "mean"),
        (lambda given, **more: ps.plan(model(NAME), given, "z", **more), "mean"),
        (lambda given, **more: ps.sweep(model(NAME), given, "pattern", **more), "mean_all"),
        (lambda given, **more: edges(model(NAME), given, **more), "mean"),
        (
            lambda given, intervention: circuit(model(NAME), given, ablation=intervention),
            "mean",
        ),
        (
            lambda given, intervention: lens(
                model(NAME), given, patch=Patch("z", 1, intervention=intervention)
            ),
            "mean",
        ),
    ],
    ids=["sweep", "plan", "pattern", "edges", "circuit", "lens"],
)
def test_mean_of_few_prompts_is_refused_with_its_pairs(
    call: Any, intervention: str, never: None
) -> None:
    long = pair_of(place="shops near the old garden")
    given = joined(pairs(), pair_of(place="park"), long, long)
    n = len(long[0])
    with pytest.raises(ConfigError) as caught:
        call(given, intervention=intervention)
    words = str(caught.value)
    # the two long ones are one prompt, said twice
    assert f"clean prompts have for {n} tokens: 1 (pairs 5, 6 need it)" in words
    assert "17 tokens" not in words
    assert "means_from=" in words
    assert ("mean_all or mean_label" in words) == (intervention == "mean")


def test_label_that_few_positions_carry_is_refused(never: None) -> None:
    with pytest.raises(ConfigError, match=r"label 'giver': 3 \(pair 0 needs it\)"):
        ps.sweep(model(NAME), pair_of(), "z", intervention="mean_label")
    with pytest.raises(ConfigError, match="means_from is for the interventions mean"):
        ps.sweep(model(NAME), pair_of(), "z", means_from=pairs())


def test_means_are_taken_over_the_prompts_that_are_given(tmp_path: Path) -> None:
    one, reference = pair_of(("Tom", "Lucy"), "park"), pairs()
    given = {"positions": [11, 15], "layers": [1], "runner": "packed"}
    ds = ps.sweep(model(NAME), one, "z", intervention="mean", means_from=reference, **given)
    # by hand: z of the four prompts, averaged, through a hook
    hook = "blocks.1.attn.hook_z"
    tokens = torch.tensor([pair.clean for pair in reference])
    _, cache = model(NAME).run_with_cache(tokens, names_filter=hook)
    mean = cache[hook].mean(dim=0)

    def put(z: Tensor, hook: Any, pos: int, head: int) -> Tensor:
        z = z.clone()
        z[:, pos, head] = mean[pos, head]
        return z

    for i, pos in enumerate([11, 15]):
        for head in range(4):
            logits = model(NAME).run_with_hooks(
                torch.tensor([one[0].clean]),
                fwd_hooks=[(hook, lambda z, hook, p=pos, h=head: put(z, hook, p, h))],
            )[0, -1]
            expected = float(logits[one[0].answer[0]] - logits[one[0].wrong_answer[0]])
            assert float(ds["z"][0, 0, 0, i, head]) == pytest.approx(expected, abs=1e-4)
    assert float(abs(ds["z"] - ds["base_metric"]).max()) > 1e-2
    told = attributes(ds)["means"]
    assert told == {
        "per": "position",
        "over": "prompts of means_from",
        "n_prompts": 4,
        "behind": {"17 tokens": 4},
        "prompts": reference.content_hash(),
    }


def test_means_from_a_file_are_those_from_its_pairs(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    lines = [
        {
            "clean": "".join(pair.clean_tokens[1:]),
            "corrupted": "".join(pair.corrupted_tokens[1:]),
            "answer": pair.answer_text,
            "wrong_answer": pair.wrong_answer_text,
        }
        for pair in pairs()
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    bridge, one = model(NAME), pair_of(("Tom", "Lucy"))
    calls: list[Any] = [
        lambda where: ps.sweep(bridge, one, "z", intervention="mean_all", means_from=where),
        lambda where: edges(bridge, one, intervention="mean", means_from=where),
        lambda where: circuit(bridge, one, ablation="mean", sizes=[0.1], means_from=where),
        lambda where: study(
            bridge, one, ablations=["resample", "mean"], optimal=None, means_from=where
        ),
    ]
    for call in calls:
        by_file, by_pairs = call(path), call(pairs())
        for name, values in by_pairs.data_vars.items():
            np.testing.assert_array_equal(by_file[name].values, values.values)


def test_other_reference_prompts_in_one_store_are_refused(tmp_path: Path) -> None:
    store, one = tmp_path / "a.zarr", pair_of(("Tom", "Lucy"))
    given = {"intervention": "mean", "positions": [15], "store": store}
    ps.sweep(model(NAME), one, "z", means_from=pairs(), **given)
    with pytest.raises(StoreError, match=r"means|intervention"):
        ps.sweep(model(NAME), one, "z", means_from=reference_pairs(NAME), **given)


def test_study_says_what_stands_behind_its_means() -> None:
    ds = study(model(NAME), pairs(), ablations=["resample", "mean", "mean_label"], optimal=None)
    told = attributes(ds)["means"]
    assert told["mean"]["behind"] == {"all positions": 4 * 17}
    assert told["mean_label"]["behind"] == {"all positions": 4 * 17, "label 'giver'": 12}
    with pytest.raises(ConfigError, match="means_from is for the ablations mean and mean_label"):
        study(
            model(NAME), pairs(), ablations=["resample", "zero"], optimal=None, means_from=pairs()
        )


def test_pages_say_how_many_prompts_stand_behind_each_mean() -> None:
    bridge, given = model(NAME), pairs()
    pages = [
        report.question.lead(ps.sweep(bridge, given, "resid_pre", intervention="mean")),
        report.edges.build(edges(bridge, given, intervention="mean")),
        report.circuit.build(circuit(bridge, given, ablation="mean", sizes=[0.1])),
    ]
    for text in pages:
        assert (
            "Means are taken over the clean prompts of the run; different prompts behind each: "
            "17 tokens: 4." in text
        )
    patch = Patch("z", 1, 15, intervention="mean")
    assert "(mean). Means are taken over the clean prompts of the run" in report.lens.build(
        lens(bridge, given, patch=patch)
    )
    ds = study(bridge, given, ablations=["resample", "mean"], optimal=None)
    assert "different positions behind each: all positions: 68." in report.heads.build(ds)
