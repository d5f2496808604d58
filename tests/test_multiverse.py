"""The multiverse: each variant equals hooks of its own, and moves are ranges of one choice."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits.ablate import run_edges, run_nodes
from patchsweep.analyses.circuits.multiverse import _moves
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE, EXIT_STOPPED, main
from patchsweep.errors import PlanError
from subjects import demo_pairs, model
from test_circuits import Hooked, random_edges, scene_of
from test_stability import pairs

NAME = "tiny:gpt2"
module = import_module("patchsweep.analyses.circuits.multiverse")


@pytest.fixture(scope="module")
def scores() -> xr.DataArray:
    return ps.circuit_scores(model(NAME), pairs(), method="eap")


# learned positions, parallel blocks, grouped heads, norms after attention and MLP
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_ablation_at_some_positions_spares_the_others(family: str) -> None:
    """All positions equal none given; no position is the clean run; nodes are all their edges."""
    scene = scene_of(f"tiny:{family}")
    length = scene.batch.length - scene.start
    keep = torch.from_numpy(random_edges(scene.nodes, [0.5]))
    pair = torch.zeros(1, dtype=torch.long)
    at = torch.ones(1, length, dtype=torch.bool)
    everywhere = run_edges(scene, keep, pair, at)
    torch.testing.assert_close(everywhere, run_edges(scene, keep, pair))
    clean = float(scene.references()[0][0, 0])
    assert run_edges(scene, keep, pair, ~at).item() == pytest.approx(clean, abs=1e-4)
    nodes = torch.rand(1, len(scene.nodes.senders) - 1) < 0.5
    torch.testing.assert_close(run_nodes(scene, nodes, pair, at), run_nodes(scene, nodes, pair))
    assert run_nodes(scene, nodes, pair, ~at).item() == pytest.approx(clean, abs=1e-4)
    some = at.clone()
    some[:, : length // 2] = False
    whole = torch.cat([torch.ones(1, 1, dtype=torch.bool), nodes], dim=1)
    edges = whole[:, :, None] & torch.from_numpy(scene.nodes.possible)
    torch.testing.assert_close(
        run_edges(scene, edges, pair, some), run_nodes(scene, nodes, pair, some),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert abs(run_nodes(scene, nodes, pair, some).item() - clean) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nodes_at_one_position_equal_hooks(family: str) -> None:
    scene = scene_of(f"tiny:{family}")
    hooked = Hooked(scene)
    at = torch.zeros(1, scene.batch.length, dtype=torch.bool)
    at[0, -1] = True
    nodes = torch.rand(1, len(scene.nodes.senders) - 1, generator=torch.Generator().manual_seed(0))
    keep = nodes < 0.5
    found = run_nodes(scene, keep, torch.zeros(1, dtype=torch.long), at[:, scene.start :]).item()
    hooks: list[tuple[str, Any]] = []
    for node, kept in zip(scene.nodes.senders[1:], keep[0].tolist(), strict=True):
        if kept:
            continue
        if node.kind == "mlp":
            new = hooked.mlp[node.layer]

            def mlp(x: Any, hook: Any, new: Any = new) -> Any:
                x[:, -1] = new[:, -1]
                return x

            hooks.append((f"blocks.{node.layer}.hook_mlp_out", mlp))
            continue

        def head(x: Any, hook: Any, node: Any = node) -> Any:
            x[:, -1, node.head] = hooked.z[node.layer][:, -1, node.head]
            return x

        hooks.append((f"blocks.{node.layer}.attn.hook_z", head))
    assert found == pytest.approx(hooked.metric(hooked.clean, *hooks), abs=1e-4)


def test_variants_equal_circuits_of_their_own(scores: xr.DataArray) -> None:
    ds = ps.multiverse(model(NAME), pairs(), scores, 60, metrics=["logit_diff", "log_prob"])
    assert ds.sizes["variant"] == (2 + 3 + 3 + 1) * 3 * 2
    assert ds.attrs["n_variants"] == ds.sizes["variant"] * 2

    def of(**choices: str) -> Any:
        chosen = np.ones(ds.sizes["variant"], bool)
        for name, option in {"positions": "all", "level": "edges", **choices}.items():
            chosen &= ds[name].values == option
        (i,) = np.flatnonzero(chosen)
        return ds["faithfulness"].values[i]

    n = int(scores.notnull().sum())
    for ablation in ("resample", "zero", "mean"):
        own = ps.circuit(
            model(NAME), pairs(), ["logit_diff", "log_prob"], scores=scores, sizes=[60 / n],
            ablation=ablation,
        )  # fmt: skip
        mean_set = "clean" if ablation == "mean" else ""
        found = of(ablation=ablation, direction="noising", mean_set=mean_set)
        np.testing.assert_allclose(found, own["faithfulness"].values[:, 0], atol=1e-3)
    assert not np.allclose(
        of(ablation="mean", mean_set="clean", direction="noising"),
        of(ablation="mean", mean_set="corrupted", direction="noising"),
        atol=1e-4,
    )
    assert np.isfinite(ds["moves"].values).all()
    assert (ds["moves_most"] >= ds["moves"] - 1e-9).all()
    assert ds.attrs["most"] == str(ds["choice"].values[int(ds["moves"].values.argmax())])


def test_denoising_restores_the_circuit(scores: xr.DataArray) -> None:
    ds = ps.multiverse(
        model(NAME), pairs(2), scores, 60, ["logit_diff"], ablations=["resample"],
        directions=["denoising"], positions=["all"], levels=["edges"],
    )  # fmt: skip
    ranks = np.argsort(-np.abs(np.nan_to_num(scores.values)).ravel(), kind="stable")[:60]
    keep = np.zeros(scores.size, bool)
    keep[ranks] = True
    from patchsweep.analyses.circuits.selection import connected

    scene = scene_of(NAME, pairs(2))
    own = connected(scene.nodes, keep.reshape(1, *scores.shape))
    # the corrupted prompt as base: swap the two
    turned = ps.PromptPairs.from_strings(
        model(NAME),
        clean=["".join(p.corrupted_tokens[1:]) for p in pairs(2)],
        corrupted=["".join(p.clean_tokens[1:]) for p in pairs(2)],
        answers=[(p.answer_text, p.wrong_answer_text) for p in pairs(2)],
    )
    other = scene_of(NAME, turned)
    pair = torch.arange(2)
    rows = [scene.nodes.possible & ~own[0], scene.nodes.possible, 0 * scene.nodes.possible]
    circuit, nothing, everything = (
        run_edges(other, torch.from_numpy(np.stack([row, row]).astype(bool)), pair)[0].mean()
        for row in rows
    )
    wanted = float((circuit - nothing) / (everything - nothing))
    assert ds["faithfulness"].item() == pytest.approx(wanted, abs=1e-4)


def test_the_command_goes_on_stores_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "multiverse", "model=tiny", "task=ioi", "task.n_pairs=2", "count=30", "method=eap",
        "metric=[logit_diff,prob]", "ablations=[zero,resample]", "positions=[all,read]",
        "levels=[edges]", "store=m.zarr",
    ]  # fmt: skip
    run, seen = module.run_batches, []

    def stopped(stages: Any, name: str, *args: Any) -> Any:
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return run(stages, name, *args)

    monkeypatch.setattr(module, "run_batches", stopped)
    assert main(words) == EXIT_STOPPED
    kept = sorted(path.name for path in Path("m.zarr.parts").iterdir())
    assert "2-variants-resample-denoising" in kept
    assert main(words) == EXIT_DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "faithfulness of 30 edges, 12 variants" in said
    assert "how far one choice alone moves it" in said
    assert main(words) == EXIT_DONE
    assert "already there, nothing was run" in capsys.readouterr().out
    ds = xr.open_zarr("m.zarr", consolidated=False)
    bridge = model("tiny:llama")
    own = ps.multiverse(
        bridge, ps.load_task(bridge, "ioi", 2), "eap", 30, ["logit_diff", "prob"],
        ablations=["zero", "resample"], positions=["all", "read"], levels=["edges"],
    )  # fmt: skip
    np.testing.assert_allclose(ds["faithfulness"], own["faithfulness"], atol=1e-6)
    assert main(["report", "m.zarr"]) == EXIT_DONE
    assert "What moves it" in Path("report.html").read_text()
    for more, told in (
        (["intervention=mean"], "ablations=[resample,mean]"),
        (["method=[eap,relp]"], "one method"),
        (["positions=[where]"], "positions='where' is not known"),
        (["count=9"], "another"),
    ):
        assert main([*words, *more]) == EXIT_MISTAKE
        assert told in capsys.readouterr().err


def test_moves_are_ranges_of_one_choice() -> None:
    cells = {
        ("zero", "", "noising", "all", "edges", "logit"): 1.0,
        ("resample", "", "noising", "all", "edges", "logit"): 0.4,
        ("zero", "", "noising", "read", "edges", "logit"): 0.9,
        ("resample", "", "noising", "read", "edges", "logit"): 0.7,
        ("resample", "", "noising", "read", "edges", "prob"): float("nan"),
    }
    assert _moves(cells, 0) == pytest.approx((0.4, 0.6))
    assert _moves(cells, 3) == pytest.approx((0.2, 0.3))
    assert np.isnan(_moves(cells, 5)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ablations": ["nope"]}, "ablations='nope' is not known"),
        ({"ablations": []}, "must be a list of some of"),
        ({"positions": "all"}, "must be a list of some of"),
        ({"levels": ["edges", "edges"]}, "names an option twice"),
        ({"directions": ["denoising"], "ablations": ["zero"]}, "resample alone"),
        ({"count": 10**6}, "count=1000000"),
    ],
)
def test_mistakes_end_before_anything_runs(
    scores: xr.DataArray, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        ps.multiverse(model(NAME), demo_pairs(NAME), scores, **{"count": 10, **options})
