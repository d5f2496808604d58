"""What a notebook shows: figures, drawings, tables, the report in a frame, and a bar."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError, StoreError
from patchsweep.notebook.figures import UNRUN
from patchsweep.report.axes import lay_out
from patchsweep.report.figure import RED_BLUE
from patchsweep.report.heatmap import draw_site
from patchsweep.report.views import choose_views
from patchsweep.results import accessor as summary
from patchsweep.sweeps import bar
from patchsweep.sweeps.executor import Quiet, check_progress
from report_data import synthetic
from subjects import demo_pairs, model
from test_report import Reader
from test_sweep import mixed_pairs

NAME = "tiny:llama"


@pytest.fixture(scope="module")
def ds() -> xr.Dataset:
    return ps.sweep(model(NAME), mixed_pairs(), ["resid_pre", "z"], method=["exact", "atp"])


def test_a_map_holds_the_numbers_and_tokens_of_the_sweep(ds: xr.Dataset) -> None:
    figure = ds.patchsweep.plot("resid_pre")
    (heat, *rest) = figure.data
    expected = summary.recovered_mean(ds, "resid_pre").squeeze("metric").transpose("layer", "pos")
    np.testing.assert_allclose(np.array(heat.z, float), expected.values, rtol=1e-6)
    assert [list(stop) for stop in heat.colorscale] == RED_BLUE
    assert heat.zmin == -heat.zmax
    assert not rest  # every column has run in some pair
    ticks = figure.layout.xaxis.ticktext
    assert ticks[-1] == f"␣to -1 n={len(mixed_pairs())}"
    assert ticks[0].endswith("n=1")
    effect = summary.largest(ds, "resid_pre", n=1)[0]
    column = ds["pos"].values.tolist().index(effect.pos)
    text = heat.hovertext[effect.layer][column]
    assert f"layer {effect.layer}" in text
    assert f"mean over {effect.n_pairs} of 4 pairs" in text
    assert f"effect {effect.effect:+.3f}".replace("-", "−") in text  # noqa: RUF001


def test_a_map_of_one_pair_shows_effects_where_asked_and_grey_where_nothing_ran(
    ds: xr.Dataset,
) -> None:
    shortest = int(np.argmin([len(pair) for pair in mixed_pairs()]))
    figure = ds.patchsweep.plot("z", pair=shortest, quantity="effect")
    z = np.array(figure.data[0].z, float)
    effects = summary.effect(ds, "z").sel(pair=shortest).squeeze("metric")
    largest = abs(effects).max("pos")
    np.testing.assert_allclose(np.abs(z), largest.transpose("layer", "head").values, rtol=1e-6)
    grey = ds.patchsweep.plot("resid_pre", pair=shortest)
    assert grey.data[1].colorscale[0][1] == UNRUN
    assert "not run" in grey.data[0].hovertext[0][0]
    at_end = ds.sel(pos=[-1]).patchsweep.plot("z", quantity="effect")
    np.testing.assert_allclose(
        np.array(at_end.data[0].z, float),
        summary.effect_mean(ds.sel(pos=[-1]), "z").squeeze().transpose("layer", "head"),
        rtol=1e-6,
    )


def test_a_map_leaves_blank_what_a_placebo_does_as_well(ds: xr.Dataset) -> None:
    placebo = ds  # as strong as what it controls: one effect in twenty is above its level
    level = summary.control_of(placebo, "z", str(ds["metric"].values[0]), None)
    assert level is not None
    plain, figure = ds.patchsweep.plot("z"), ds.patchsweep.plot("z", placebo=placebo)
    effect = np.abs(summary.effect_mean(ds, "z").squeeze("metric"))
    largest = lay_out(effect).grid(effect).max(axis=2)
    before, after = (np.array(x.data[0].z, float) for x in (plain, figure))
    blank = np.isnan(after) & ~np.isnan(before)
    assert (blank == (largest <= level)[:, -blank.shape[1] :]).all()
    assert 0 < blank.sum() < blank.size
    assert "control level" in figure.layout.title.text
    with pytest.raises(PlanError, match="leave pair out"):
        ds.patchsweep.plot("z", pair=0, placebo=placebo)


def test_a_site_with_one_axis_is_drawn_as_bars() -> None:
    pairs = demo_pairs(NAME)
    layers = ps.sweep(model(NAME), pairs, "mlp_out", positions="all")
    figure = layers.patchsweep.plot("mlp_out", quantity="effect")
    np.testing.assert_allclose(
        np.array(figure.data[0].y, float), summary.effect(layers, "mlp_out").values.ravel()
    )
    words = ps.sweep(model(NAME), pairs, "embed")
    ticks = words.patchsweep.plot("embed").layout.xaxis.ticktext
    assert ticks[-1] == "␣to 16"


def test_a_scatter_sets_estimates_against_exact_effects(ds: xr.Dataset) -> None:
    figure = ds.patchsweep.scatter("z", "atp")
    points = figure.data[1]
    one = ps.sweep(model(NAME), mixed_pairs(), "z")
    exact = summary.effect_mean(one, "z").values
    alive = np.isfinite(exact) & (exact != 0)
    assert abs(len(points.x) - alive.sum()) <= 0.2 * alive.sum()
    np.testing.assert_allclose(
        np.sort(np.abs(points.x))[-5:], np.sort(np.abs(exact[alive]))[-5:], rtol=1e-3
    )
    assert "Pearson" in figure.layout.title.text
    with pytest.raises(MethodError, match="no exact effects and estimates of relp"):
        ds.patchsweep.scatter("z", "relp")


@pytest.mark.parametrize("call", ["edges", "exact_edges"])
def test_edges_are_drawn_with_the_reports_colours(call: str, tmp_path: Path) -> None:
    if call == "edges":
        found = ps.edges(model(NAME), demo_pairs(NAME))
    else:
        found = ps.exact_edges(model(NAME), demo_pairs(NAME), ["m0->m1", "a0.h1->m2"])
    drawing = found.patchsweep.plot_edges(6)
    assert drawing.svg in drawing._repr_html_()
    assert drawing.svg.count("<path") >= 2
    path = drawing.save(tmp_path / "edges.svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in path.read_text()
    with pytest.raises(StoreError, match="holds no edges"):
        synthetic(n_layers=2).patchsweep.plot_edges()


def test_tokens_of_a_store_stay_text_in_figures() -> None:
    hostile = synthetic(n_layers=2)
    tokens = hostile["base_token"].values.copy()
    tokens[:] = "<b>x"
    hostile = hostile.assign_coords(base_token=(("pair", "pos"), tokens))
    figure = hostile.patchsweep.plot("resid_pre")
    assert all("<b>x" not in text for text in figure.layout.xaxis.ticktext)
    with pytest.raises(PlanError, match="pair=7 is not in the store"):
        hostile.patchsweep.plot("resid_pre", pair=7)


def test_pairs_costs_and_largest_effects_are_tables(ds: xr.Dataset) -> None:
    pairs = demo_pairs(NAME)
    page = Reader(pairs._repr_html_())
    assert page.count("mark") == 2  # the one token that differs, in both prompts
    assert "corrupted" in page.text
    many = PromptPairs(pairs.pairs * 13)
    assert "and 3 pairs more" in Reader(many._repr_html_()).text
    cost = ps.plan(model(NAME), pairs, ["resid_pre", "z"], method=["exact", "atp"])
    assert Reader(cost._repr_html_()).count("tr") == 4
    top = ds.patchsweep.largest("z", n=3)
    text = Reader(top._repr_html_()).text
    assert f"{top[0].effect:+.3f}".replace("-", "−") in text  # noqa: RUF001
    assert top == list(top)


def test_a_report_lies_in_a_frame_that_cannot_leave_it(ds: xr.Dataset, tmp_path: Path) -> None:
    report = ds.patchsweep.report()
    frame = Reader(report._repr_html_())
    ((tag, attrs),) = frame.seen
    assert (tag, attrs["sandbox"]) == ("iframe", "allow-scripts allow-downloads")
    assert attrs["srcdoc"] == report.html
    assert report.save(tmp_path / "r.html").read_text(encoding="utf-8") == report.html
    lens = ps.lens(model(NAME), demo_pairs(NAME))
    assert "<title>" in lens.patchsweep.report().html


# Progress


class Spy(Quiet):
    """Records what a run reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def begin(self, n_units: int, total: int, done: int) -> None:
        self.seen.append(("begin", total - done))

    def stage(self, name: str) -> None:
        self.seen.append(("stage", name))

    def within(self, token_layers: int) -> None:
        self.seen.append(("within", token_layers))

    def advance(self, unit: Any, token_layers: int, n_live: int, seconds: float) -> None:
        self.seen.append(("advance", token_layers))

    def end(self) -> None:
        self.seen.append(("end", None))


def test_progress_moves_inside_a_packed_batch_and_ends() -> None:
    spy = Spy()
    ps.sweep(model(NAME), demo_pairs(NAME), "z", progress=spy)
    kinds = [kind for kind, _ in spy.seen]
    (total,) = (n for kind, n in spy.seen if kind == "begin")
    inside = [n for kind, n in spy.seen[: kinds.index("advance")] if kind == "within"]
    assert inside == sorted(inside)
    assert len(set(inside)) >= 4  # more than one step before the only shard is done
    assert 0 < inside[0] < inside[-1] <= total
    assert kinds[-1] == "end"


def test_every_stage_of_an_analysis_says_its_name() -> None:
    from patchsweep.analyses.stages import Stages

    spy = Spy()
    ps.edges(model(NAME), demo_pairs(NAME), stages=Stages(progress=spy))
    ps.lens(model(NAME), demo_pairs(NAME), stages=Stages(progress=spy))
    names = [name for kind, name in spy.seen if kind == "stage"]
    assert len(names) >= 2
    assert "lens" in names


def test_a_bar_is_shown_in_a_terminal_and_goes_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(bar, "_DELAY_S", 0.0)
    ps.sweep(model(NAME), demo_pairs(NAME), ["resid_pre", "z"])
    assert "token-layers" in screen.getvalue()
    screen.truncate(0)
    ps.sweep(model(NAME), demo_pairs(NAME), ["resid_pre", "z"], progress=False)
    assert "token-layers" not in screen.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    ps.sweep(model(NAME), demo_pairs(NAME), "z")
    assert sys.stderr.getvalue() == ""
    assert isinstance(check_progress(True), bar.Bar)


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_first_positions_of_a_long_prompt_that_change_nothing_are_one_column(site: str) -> None:
    bridge = ps.load_model("tiny:llama")
    start = " ".join(["ago"] * 22)
    pairs = ps.PromptPairs.from_strings(
        bridge,
        [f"{start} John and Mary went to the shop and John saw"],
        [f"{start} John and Mary went to the shop and Mary saw"],
        [(" Mary", " John")],
    )
    ds = ps.sweep(bridge, pairs, site, layers=[0, 1])
    effect = summary.effect_mean(ds, site).squeeze("metric").transpose("layer", "pos").values
    first = int((ds["base_token"].values != ds["source_token"].values)[0].argmax())
    assert first > 40
    np.testing.assert_array_equal(effect[:, :first], 0)
    assert (effect[:, first:] != 0).any(axis=0).all()

    figure = ds.patchsweep.plot(site)
    drawn = np.array(figure.data[0].z, float)
    assert drawn.shape == (2, effect.shape[1] - first + 1)
    assert (drawn[:, 0] == 0).all()
    np.testing.assert_array_equal(drawn[:, 1:] != 0, effect[:, first:] != 0)
    assert figure.layout.xaxis.ticktext[0] == f"<i>{first} positions</i>"
    assert f"positions 0 to {first - 1}" in figure.data[0].hovertext[0][0]
    widths = np.diff(figure.data[0].x)
    assert widths[0] < widths[1] == widths[-1]

    (view,) = choose_views(ds, (site,))
    (frame,) = draw_site(ds, site, (view,)).frames.values()
    assert frame.cells["fold"] == first
