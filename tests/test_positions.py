"""Positions and layers: counted from the end, `end`, and aligned for unequal prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.cli.schema.run import SitesConfig
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PlanError
from patchsweep.report.heatmap import draw_site
from patchsweep.report.views import choose_views
from patchsweep.results import accessor as summary
from subjects import demo_pairs, model
from test_report import read, unpack
from test_sweep import mixed_pairs

NAME = "tiny:llama"


def values(ds: xr.Dataset, site: str = "z") -> np.ndarray:
    return ds[site].values


def test_negative_layers_and_positions_and_the_end_are_those_from_the_start() -> None:
    pairs, llama = demo_pairs(NAME), model(NAME)
    last = len(pairs[0]) - 1
    back = ps.sweep(llama, pairs, "z", layers=[-1, [0, -2]], positions=[-1, "end", last - 4, -5])
    there = ps.sweep(llama, pairs, "z", layers=[2, [0, 1]], positions=[last, last - 4])
    assert back["layer"].values.tolist() == ["2", "0+1"]
    assert back["pos"].values.tolist() == ["-1", "end", str(last - 4), "-5"]
    assert (back["base_token"].values[0] == [" to", " to", " a", " a"]).all()
    assert float(abs(summary.effect(there, "z")).max()) > 0.1
    for mine, other in ((0, 0), (1, 0), (2, 1), (3, 1)):
        np.testing.assert_allclose(
            values(back)[:, :, :, mine], values(there)[:, :, :, other], atol=1e-5
        )


def test_prompts_of_unequal_lengths_are_aligned_at_their_ends() -> None:
    pairs = mixed_pairs()
    lengths = [len(pair) for pair in pairs]
    together = ps.sweep(model(NAME), pairs, ["resid_pre", "z"])
    assert together["pos"].values.tolist() == list(range(-max(lengths), 0))
    assert (together["base_token"].sel(pos=-1) == " to").all()
    for i, (pair, length) in enumerate(zip(pairs, lengths, strict=True)):
        alone = ps.sweep(model(NAME), PromptPairs((pair,)), "z", positions=range(length))
        row = together["z"].values[0, i]
        np.testing.assert_allclose(row[:, -length:], alone["z"].values[0, 0], atol=1e-4)
        assert np.isnan(row[:, :-length]).all()
        assert (together["base_token"].values[i][:-length] == "").all()


def test_the_end_is_that_of_the_prompt_and_not_of_a_forced_answer() -> None:
    pairs = PromptPairs.from_strings(
        model(NAME),
        clean=["When John and Mary went to the shops, John gave a bottle of milk to"],
        corrupted=["When John and Mary went to the shops, Mary gave a bottle of milk to"],
        answers=[(" Mary and", " John and")],
        multi_token=True,
    )
    n = len(pairs[0])
    assert len(pairs[0].answer) > 1
    ds = ps.sweep(model(NAME), pairs, "resid_pre", positions=[n - 1, -1, "end"])
    np.testing.assert_array_equal(values(ds, "resid_pre")[..., 0], values(ds, "resid_pre")[..., 1])
    np.testing.assert_array_equal(values(ds, "resid_pre")[..., 0], values(ds, "resid_pre")[..., 2])


def test_labels_are_every_shared_label_in_order_and_the_end() -> None:
    def labelled(*spans: dict[str, tuple[int, int]]) -> PromptPairs:
        pairs = zip(mixed_pairs(), spans, strict=True)
        return PromptPairs(tuple(replace(pair, labels=spans) for pair, spans in pairs))

    spans = [{"S": (len(p) - 7, len(p) - 5), "IO": (2, 4), "own": (1, 2)} for p in mixed_pairs()]
    del spans[0]["own"]
    pairs = labelled(*spans)
    ds = ps.sweep(model(NAME), pairs, "z", positions="labels")
    assert ds["pos"].values.tolist() == ["IO", "S", "end"]
    one = ps.sweep(model(NAME), PromptPairs(pairs.pairs[:1]), "z", positions=["S", -1])
    np.testing.assert_allclose(
        ds["z"].sel(pair=0, pos=["S", "end"]), one["z"].sel(pair=0), atol=1e-4
    )
    named = labelled(*({**s, "end": (3, 4)} for s in spans))
    own = ps.sweep(model(NAME), named, "z", positions="labels")
    assert own["pos"].values.tolist() == ["IO", "end", "S"]  # a label of the name goes first
    assert own["base_token"].values[0][1] == mixed_pairs()[0].corrupted_tokens[3]
    with pytest.raises(PlanError, match="needs a label that all pairs have"):
        ps.sweep(model(NAME), mixed_pairs(), "z", positions="labels")


def test_a_map_says_how_many_pairs_stand_behind_each_column() -> None:
    pairs = mixed_pairs()
    lengths = np.array([len(pair) for pair in pairs])
    ds = ps.sweep(model(NAME), pairs, "resid_pre")
    expected = [(lengths >= -p).sum() for p in ds["pos"].values]
    assert len(set(expected)) > 1
    behind = ds.patchsweep.n_pairs("resid_pre").squeeze("metric")
    assert (behind == xr.DataArray(expected, dims="pos")).all()
    for effect in summary.largest(ds, "resid_pre", n=40):
        assert effect.n_pairs == expected[ds["pos"].values.tolist().index(effect.pos)]
    page = read(ds)
    mean, one = page.data["views"][0], page.data["views"][2]
    assert mean["n_pairs"] == expected
    assert (mean["first"], mean["n_pos"]) == (0, max(lengths))
    assert one["n_pairs"] == []
    assert (one["first"], one["n_pos"]) == (max(lengths) - lengths[1], max(lengths))
    assert "Positions count from the end of each prompt." in page.text
    assert "Grey" not in page.text  # padding is no patch that did not run


def test_the_map_of_a_shorter_pair_starts_at_its_own_first_token() -> None:
    ds = ps.sweep(model(NAME), mixed_pairs(), "resid_pre")
    views = choose_views(ds, ("resid_pre",))
    figure = draw_site(ds, "resid_pre", views)
    shortest = int(np.argmin([len(p) for p in mixed_pairs()]))
    view = next(v for v in views if v.pair == shortest)
    assert view.base_tokens[view.first] != ""
    assert view.base_tokens[view.first - 1] == ""
    (frame,) = (f for key, f in figure.frames.items() if key.endswith(f"|{view.key}"))
    drawn = unpack(frame.cells, "value").reshape(ds.sizes["layer"], -1)[:, view.first :]
    assert np.isfinite(drawn).all()


def test_the_command_line_takes_the_words_too() -> None:
    for word in ("labels", "end", "all"):
        assert SitesConfig(["z"], positions=word).positions == word
    with pytest.raises(ConfigError, match="an index or a list, or labels, or end, or all"):
        SitesConfig(["z"], positions="every")
