"""Greedy pruning equals a plain loop that runs one whole circuit after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from patchsweep import acdc
from patchsweep.analyses.circuits import exact_edges
from patchsweep.analyses.circuits.ablate import run_edges
from patchsweep.analyses.circuits.acdc import prune
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.selection import reaching
from patchsweep.analyses.circuits.subgraph import DenseRuns, SparseRuns, runs_of
from patchsweep.analyses.stages import Stages
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE, main
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PatchsweepError
from patchsweep.forward.blockwise import Blocks
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from test_circuits import scene_of

# learned positions; grouped heads; parallel blocks; norms after attention and MLP
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2"]
THRESHOLDS = [0.03, 0.1, 0.5]


def plain_loop(name: str, threshold: float) -> tuple[np.ndarray, float, int]:
    """(edges left, distance, circuits run), one circuit after the other, every node of each run."""
    scene = scene_of(f"tiny:{name}")
    nodes, zero = scene.nodes, torch.zeros(1, dtype=torch.long)

    def distance(kept: np.ndarray) -> float:
        value = run_edges(scene, torch.from_numpy(kept)[None], zero)
        return float((value[0, 0] - scene.references()[0][0, 0]).abs())

    kept, here, n = nodes.possible.copy(), 0.0, 0
    for reader in reversed(range(len(nodes.readers))):
        for sender in reversed(np.flatnonzero(kept[:, reader])):
            trial = kept.copy()
            trial[sender, reader] = False
            found = distance(trial)
            n += 1
            if found - here < threshold:
                kept, here = trial, found
    return kept, here, n


@pytest.mark.slow  # the plain loop runs every node of every circuit, one circuit after the other
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_equals_a_plain_loop_at_three_thresholds(family: str) -> None:
    name = f"tiny:{family}"
    ds = acdc(model(name), demo_pairs(name), "logit_diff", thresholds=THRESHOLDS)
    sizes = []
    for i, threshold in enumerate(THRESHOLDS):
        kept, distance, n = plain_loop(family, threshold)
        assert (ds["kept"].values[i] == kept).all()
        assert float(ds["distance"][i]) == pytest.approx(distance, abs=1e-4)
        assert int(ds["n_candidates"][i]) == n == kept.size - (~nodes_of(family).possible).sum()
        sizes.append(int(kept.sum()))
        assert int(ds["n_edges"][i]) == sizes[-1]
        assert int(ds["n_dead"][i]) > 0
    assert len(set(sizes)) == 3
    assert sizes[0] > 0  # the largest threshold may let all go


def nodes_of(family: str) -> Nodes:
    return scene_of(f"tiny:{family}").nodes


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_sparse_runs_equal_dense_ones_wherever_a_circuit_stands(family: str) -> None:
    """Readers are pruned at random, from the logits down, and each circuit is run both ways."""
    scene = scene_of(f"tiny:{family}")
    nodes, rng = scene.nodes, np.random.default_rng(0)
    sparse, dense = runs_of(scene), DenseRuns(scene)
    assert isinstance(sparse, SparseRuns)
    kept = nodes.possible[:, :, None].copy()
    seen = []
    for reader in reversed(range(len(nodes.readers))):
        if not reaching(nodes, kept.any(axis=-1))[reader]:
            kept[:, reader] = False
            continue
        masks = kept[None, :, reader] & (rng.random((3, len(nodes.senders), 1)) < 0.6)
        found = [runs.run(kept, reader, masks) for runs in (sparse, dense)]
        torch.testing.assert_close(*found, atol=1e-4, rtol=0)
        seen += found[0].flatten().tolist()
        kept[:, reader] = masks[0]
        sparse.commit(kept, reader)
    assert np.ptp(seen) > 1.0


def test_one_edge_less_at_a_position_is_the_exact_edge_there() -> None:
    """The model with one edge removed is that edge patched, in either table."""
    name = "tiny:llama"
    scene = scene_of(name)
    nodes, width = scene.nodes, scene.base.length
    table = exact_edges(model(name), demo_pairs(name), "all", direction="noising", positions=True)
    runs = runs_of(scene)
    kept = np.repeat(nodes.possible[:, :, None], width, axis=2)
    rng = np.random.default_rng(0)
    at = np.argwhere(nodes.possible)
    effects = []
    for sender, reader in at[rng.permutation(len(at))[:20]]:
        pos = int(rng.integers(scene.start, width))
        masks = kept[None, :, reader].copy()
        masks[0, sender, pos] = False
        found = runs.run(kept, int(reader), masks).item()
        assert found == pytest.approx(table["edge"].values[0, 0, sender, reader, pos], abs=1e-4)
        effects.append(found)
    assert np.ptp(effects) > 0.1


def test_a_circuit_with_equal_positions_is_the_circuit_without() -> None:
    scene = scene_of("tiny:llama")
    nodes, width, rng = scene.nodes, scene.base.length, np.random.default_rng(1)
    whole, single = runs_of(scene), runs_of(scene)
    kept = nodes.possible[:, :, None].copy()
    for reader in reversed(range(len(nodes.readers))):
        masks = kept[None, :, reader] & (rng.random((2, len(nodes.senders), 1)) < 0.8)
        expected = whole.run(kept, reader, masks)
        wide = np.repeat(kept, width, axis=2), reader, np.repeat(masks, width, axis=2)
        torch.testing.assert_close(single.run(*wide), expected, atol=1e-4, rtol=0)
        kept[:, reader] = masks[0]
        whole.commit(kept, reader)
        single.commit(np.repeat(kept, width, axis=2), reader)


def test_positions_are_pruned_too_and_fewer_places_are_left() -> None:
    name = "tiny:llama"
    one = acdc(model(name), demo_pairs(name), "logit_diff", thresholds=[0.1])
    ds = acdc(model(name), demo_pairs(name), "logit_diff", thresholds=[0.1], positions=True)
    assert ds["kept"].dims == ("threshold", "sender", "reader", "pos")
    n_pos = ds.sizes["pos"]
    assert 0 < int(ds["n_edges"][0]) < int(one["n_edges"][0]) * n_pos
    first = int(scene_of(name).start)
    assert not ds["kept"].values[..., :first].any()  # nothing changes before it
    assert float(ds["distance"][0]) == pytest.approx(
        abs((ds["circuit_metric"] - ds["base_metric"]).item()), abs=1e-6
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_chains_decide_as_a_plain_loop_does(rate: float) -> None:
    """Distances of a made-up kind, in which what was removed before changes what is next."""
    nodes = Nodes(n_layers=2, n_heads=3, n_kv_heads=3, parallel=(False, False))
    weight = np.random.default_rng(2).normal(0.0, 1.0, nodes.possible.shape)
    rows_run = 0

    def distance(kept: np.ndarray) -> float:
        gone = np.where(nodes.possible & ~kept[:, :, 0], weight, 0.0)
        return float(abs(gone.sum() + 0.5 * np.sin(3.0 * gone.sum(axis=1)).sum()))

    def run(kept: np.ndarray, reader: int, masks: np.ndarray) -> np.ndarray:
        nonlocal rows_run
        rows = np.repeat(kept[None], len(masks), axis=0)
        rows[:, :, reader] = masks
        rows_run += len(rows)
        return np.array([distance(row) for row in rows])

    found = prune(nodes, rate, nodes.possible[:, :, None], run, lambda *_: None, lambda *_: 7)
    kept, here = nodes.possible[:, :, None].copy(), 0.0
    for reader in reversed(range(len(nodes.readers))):
        useful = reaching(nodes, kept.any(axis=-1))[reader]
        for sender in reversed(np.flatnonzero(kept[:, reader, 0])):
            trial = kept.copy()
            trial[sender, reader] = False
            new = distance(trial)
            if not useful:  # no run: such an edge changes nothing in a model
                kept = trial
            elif new - here < rate:
                kept, here = trial, new
    if rate == 0.3:
        assert 0 < kept.sum() < nodes.n_edges
    live = reaching(nodes, found.kept.any(axis=-1))
    assert (found.kept[:, live] == kept[:, live]).all()
    assert found.n_runs == rows_run >= found.n_candidates - found.n_dead


def test_slices_share_thresholds_and_a_store_is_not_run_again(tmp_path: Path) -> None:
    name, store = "tiny:llama", tmp_path / "acdc.zarr"

    def run(index: int = 0) -> Any:
        stages = Stages(store, slice_index=index, n_slices=2)
        found = acdc(
            model(name), demo_pairs(name), "logit_diff", thresholds=[0.1, 0.5], stages=stages
        )
        return found, stages.known

    with pytest.raises(PatchsweepError, match="units of other slices"):
        run(0)
    found, known = run(1)
    assert not known
    whole = acdc(model(name), demo_pairs(name), "logit_diff", thresholds=[0.1, 0.5])
    assert (found["kept"] == whole["kept"]).all()
    assert run(0)[1]


def test_pairs_of_two_lengths_are_pruned_together() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, f"Then {CLEAN}"],
        corrupted=[CORRUPTED, f"Then {CORRUPTED}"],
        answers=[(" Mary", " John")] * 2,
    )
    ds = acdc(bridge, pairs, thresholds=[0.02])
    away = np.abs(ds["circuit_metric"][0] - ds["base_metric"]).mean()
    assert float(ds["distance"][0]) == pytest.approx(float(away), abs=1e-6)
    assert attributes(ds)["metric"] == "kl_base"
    with pytest.raises(PatchsweepError, match="pairs of one length"):
        acdc(bridge, pairs, positions=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"thresholds": []}, "must be a list"),
        ({"thresholds": 0.1}, "must be a list"),
        ({"thresholds": [0.0]}, "above 0"),
        ({"thresholds": [0.1, 0.1]}, "name one twice"),
        ({"metric": ["logit_diff", "kl_base"]}, "one metric"),
        ({"positions": "yes"}, "positions"),
        ({"ablation": "shuffle"}, "resample"),
    ],
)
def test_mistakes_are_named_before_any_forward(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blocks, "__init__", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(PatchsweepError, match=words):
        acdc(model("tiny:llama"), demo_pairs("tiny:llama"), **settings)


def test_norms_after_attention_have_no_positions() -> None:
    with pytest.raises(MethodError, match="leave positions out"):
        acdc(model("tiny:gemma2"), demo_pairs("tiny:gemma2"), positions=True)


def test_the_command_prunes_stores_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["acdc", "model=tiny", "thresholds=[0.02,0.2]", "store=a.zarr"]
    assert main(command) == EXIT_DONE
    assert "pruned by kl_base" in capsys.readouterr().out
    ds = xr.open_zarr("a.zarr", consolidated=False)
    expected = acdc(model("tiny:llama"), demo_pairs("tiny:llama"), thresholds=[0.02, 0.2])
    np.testing.assert_array_equal(ds["kept"], expected["kept"])
    assert main(command) == EXIT_DONE
    assert "already there, nothing was run" in capsys.readouterr().out
    assert main(["report", "a.zarr"]) == EXIT_DONE
    assert "can go?" in Path("report.html").read_text()
    for words, told in (
        (["thresholds=0.1"], "must be a list"),
        (["thresholds=[0]"], "above 0"),
        (["sites=heads"], "have no sites"),
        (["intervention=mean"], "ablation=mean"),
    ):
        assert main([*command, *words]) == EXIT_MISTAKE
        assert told in capsys.readouterr().err
