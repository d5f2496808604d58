"""All edges with a tolerance: zero thresholds are exact, infinite ones linear; the rest within."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from patchsweep.analyses.circuits import every_edge as every_module
from patchsweep.analyses.circuits import exact_edges, screen_edges
from patchsweep.analyses.circuits.adaptive_edges import AdaptiveEdges
from patchsweep.analyses.circuits.edge_batch import ExactBatches, ask
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge
from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.errors import ConfigError, MethodError
from patchsweep.forward.grad import frozen
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.spec.interventions import ValueFn
from subjects import demo_pairs, model

# grouped heads, parallel blocks, norms after attention and a sliding window
NAMES = ["tiny:llama", "tiny:gpt_neox", "tiny:gemma2", "tiny:gpt2"]
LOGITS = 0.05  # a tolerance far below the effects of tiny models, which are of order one


def run(
    name: str,
    *levels: tuple[float, float],
    positions: bool = False,
    change: str | ValueFn = "resample",
) -> tuple[Any, ...]:
    """Return exact values and those at each (theta, tau), of the same random edges."""
    bridge = model(name)
    question = ask(bridge, demo_pairs(name), intervention=change)
    with frozen(bridge):
        (batch,) = ExactBatches(question).of(range(len(question.pairs)))
        rng = np.random.default_rng(3)
        at = np.argwhere(batch.nodes.possible)
        at = at[rng.permutation(len(at))[:80]]
        few = [batch.start, batch.start + 1, batch.end - 1]
        pos = [few[i % 3] if positions else None for i in range(len(at))]
        edges = [
            Edge(batch.nodes.senders[u], batch.nodes.readers[v], p)
            for (u, v), p in zip(at, pos, strict=True)
        ]
        adaptive = AdaptiveEdges(batch, question)
        base, _ = batch.references()
        known = exact(batch, edges).cpu().numpy()
        found = [
            adaptive.run(edges, np.full(tuple(base.shape), theta, np.float32), tau, max_tokens=64)
            for theta, tau in levels
        ]
    return known, known - base.cpu().numpy()[..., None], found


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_thresholds_of_zero_are_exact_and_loose_ones_run_less(name: str, positions: bool) -> None:
    known, effect, (all_awake, loose, asleep) = run(
        name, (0.0, 0.0), (0.01, 0.01), (1e9, 1e9), positions=positions
    )
    rounding = 1e-3 * np.abs(effect).max()
    assert rounding > 1e-5
    np.testing.assert_allclose(all_awake[0], known, atol=rounding)
    assert np.abs(all_awake[1]).max() < rounding  # nothing is linear
    assert np.abs(loose[0] - known).max() < 0.3 * np.abs(effect).max()
    assert asleep[2].sum() < loose[2].sum() < all_awake[2].sum()


@pytest.mark.parametrize("name", NAMES)
def test_small_changes_are_linear(name: str) -> None:
    # all asleep, a value is the base run's plus gradients: right for a change of a thousandth
    known, effect, (asleep,) = run(
        name, (1e9, 1e9), change=lambda site, layer, base, source: 0.999 * base
    )
    assert np.abs(effect).max() > 1e-4
    np.testing.assert_allclose(asleep[0], known, atol=0.03 * np.abs(effect).max())


@pytest.mark.parametrize("positions", [False, True])
def test_all_edges_keep_to_a_tolerance_and_say_what_ran(positions: bool) -> None:
    name = "tiny:llama"
    exact_ones = exact_edges(model(name), demo_pairs(name), "all", positions=positions)
    found = exact_edges(model(name), demo_pairs(name), "all", positions=positions, tolerance=LOGITS)
    np.testing.assert_array_equal(found["edge_dead"], exact_ones["edge_dead"])
    error = np.abs(found["edge"] - exact_ones["edge"])
    assert 0 < float(error.max()) < LOGITS
    assert found["edge_token_layers"].dims == found["edge_dead"].dims
    assert float(found["edge_token_layers"].where(found["edge_dead"] > 0).sum()) == 0
    (note,) = tolerance_notes(found)
    assert note.startswith(f"edge: tolerance {LOGITS}; on a sample of ")
    assert "largest error" in note
    assert found["edge_linear"].dims == found["edge"].dims


def test_a_share_of_the_difference_and_the_screen_take_a_tolerance_too() -> None:
    name = "tiny:llama"
    known = screen_edges(model(name), demo_pairs(name), top="all")
    found = screen_edges(model(name), demo_pairs(name), top="all", tolerance="2%")
    xr.testing.assert_identical(found["edge_eap"], known["edge_eap"])
    gap = np.abs(known["source_metric"] - known["base_metric"])
    assert (
        (np.abs(found["edge"] - known["edge"]) <= 0.02 * gap + 1e-5)
        .where(known["edge_dead"] >= 0, True)
        .all()
    )


def test_where_no_thresholds_suffice_every_edge_runs_exactly() -> None:
    name = "tiny:llama"
    known = exact_edges(model(name), demo_pairs(name), "all")
    found = exact_edges(model(name), demo_pairs(name), "all", tolerance=1e-9)
    np.testing.assert_array_equal(found["edge"], known["edge"])
    (note,) = tolerance_notes(found)
    assert note == "edge: exact; no thresholds met the tolerance 1e-09 on the sample"
    assert float(np.nanmax(np.abs(found["edge_linear"]))) == 0


def test_a_run_with_a_tolerance_resumes_and_takes_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny:llama"

    def to(path: Path, **settings: Any) -> xr.Dataset:
        return exact_edges(
            model(name),
            demo_pairs(name),
            "all",
            tolerance=LOGITS,
            stages=Stages(str(path), **settings),
        )

    known = to(tmp_path / "whole.zarr")
    fill, layers = every_module._fill, []

    def stops(cells: Any, ready: Any, layer: int, *rest: Any) -> None:
        if len(layers) == 2:
            raise RuntimeError("a stop between layers")
        layers.append(layer)
        fill(cells, ready, layer, *rest)

    monkeypatch.setattr(every_module, "_fill", stops)
    with pytest.raises(RuntimeError, match="a stop"):
        to(tmp_path / "broken.zarr")
    monkeypatch.setattr(every_module, "_fill", fill)
    xr.testing.assert_identical(to(tmp_path / "broken.zarr").drop_attrs(), known.drop_attrs())
    with pytest.raises(Unfinished):
        to(tmp_path / "sliced.zarr", slice_index=0, n_slices=2)
    xr.testing.assert_identical(
        to(tmp_path / "sliced.zarr", slice_index=1, n_slices=2).drop_attrs(), known.drop_attrs()
    )


def test_a_tolerance_that_cannot_be_met_is_refused_before_a_run() -> None:
    name = "tiny:llama"
    bridge, pairs = model(name), demo_pairs(name)
    with pytest.raises(ConfigError, match=r"tolerance=0.1 needs a sample.*edges='all'"):
        exact_edges(bridge, pairs, ["m0->logits"], tolerance=0.1)
    with pytest.raises(ConfigError, match=r"tolerance=0.1 needs a sample.*top='all'"):
        screen_edges(bridge, pairs, top=3, tolerance=0.1)
    with pytest.raises(ConfigError, match="tolerance=-1"):
        exact_edges(bridge, pairs, "all", tolerance=-1)
    with pytest.raises(MethodError, match="metric rank changes by jumps"):
        exact_edges(bridge, pairs, "all", "rank", tolerance=0.1)
