"""Several interventions in one sweep equal one sweep each, and share what is captured."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import pairs_of
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE
from patchsweep.errors import PatchsweepError
from patchsweep.report import page_of
from patchsweep.runners.packed.runner import PackedRunner
from subjects import model

NAME = "tiny:llama"
SITES = ["resid_pre", "z", "mlp_out"]


def named() -> dict:
    return {
        "zero": "zero",
        "half": ps.Scale(0.5),
        "up": ps.Add(torch.linspace(-1, 1, 32), 2.0),
        "other": "shuffle",
    }


@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_several_interventions_equal_one_sweep_each(runner: str) -> None:
    pairs = pairs_of(NAME, 2)
    options = {"direction": "noising", "positions": [3, 10, 16], "runner": runner}
    ds = ps.sweep(model(NAME), pairs, SITES, intervention=named(), **options)
    assert ds["intervention"].values.tolist() == [*named()]
    assert ds["z"].dims == ("metric", "pair", "intervention", "layer", "pos", "head")
    for name, one in named().items():
        alone = ps.sweep(model(NAME), pairs, SITES, intervention=one, **options)
        for site in SITES:
            np.testing.assert_allclose(
                ds[site].sel(intervention=name).values, alone[site].values, atol=1e-5
            )
        chosen = ds.sel(intervention=name)
        best, expected = chosen.patchsweep.largest("z")[0], alone.patchsweep.largest("z")[0]
        assert (best.layer, best.pos, best.head) == (expected.layer, expected.pos, expected.head)
    effects = ds.patchsweep.effect("z")
    assert (
        float(abs(effects.sel(intervention="zero") - effects.sel(intervention="half")).max()) > 0.1
    )
    assert "intervention" in ds.patchsweep.recovered_mean("z").dims
    with pytest.raises(PatchsweepError, match=r"choose one, such as ds.sel\(intervention='zero'\)"):
        ds.patchsweep.largest("z")


def test_the_captured_runs_are_shared(monkeypatch) -> None:
    loads = []
    load = PackedRunner.load

    def counted(self, batch, *args, **kwargs):
        loads.append(batch.pairs)
        return load(self, batch, *args, **kwargs)

    monkeypatch.setattr(PackedRunner, "load", counted)
    several = {name: x for name, x in named().items() if name != "other"}
    ps.sweep(
        model(NAME), pairs_of(NAME, 1), "z", intervention=several, direction="noising",
        runner="packed",
    )  # fmt: skip
    assert len(loads) == 1


def test_a_store_of_several_goes_on_and_its_page_chooses(tmp_path) -> None:
    place = tmp_path / "s.zarr"
    options = {"direction": "noising", "positions": [3, 16], "runner": "packed"}
    several = {name: x for name, x in named().items() if name != "other"}
    first = ps.sweep(
        model(NAME), pairs_of(NAME, 1), "z", intervention=several, store=place, **options
    )
    again = ps.sweep(
        model(NAME), pairs_of(NAME, 1), "z", intervention=several, store=place, **options
    )
    np.testing.assert_array_equal(first["z"].values, again["z"].values)
    with pytest.raises(
        PatchsweepError, match=r"another run: intervention\.half is scale, factor=0\.25"
    ):
        ps.sweep(
            model(NAME), pairs_of(NAME, 1), "z",
            intervention={**several, "half": ps.Scale(0.25)}, store=place, **options,
        )  # fmt: skip
    page = page_of(ps.open_store(place), "s.zarr")
    assert "logit_diff, zero" in page
    assert "logit_diff, half" in page


@pytest.mark.parametrize(
    ("several", "options", "says"),
    [
        ({}, {}, "must map names to interventions"),
        ({1: "zero"}, {}, "must map names to interventions"),
        ({"a": "zero", "b": "resample"}, {}, "different default directions"),
        ({"a": "zero", "b": "nothing"}, {}, "intervention 'nothing' is not known"),
        ({"a": "zero", "b": "mean"}, {}, "needs 4 behind each"),
        ({"a": "zero"}, {"method": "atp"}, "method='atp' is given"),
        ({"a": "zero"}, {"tolerance": 0.1}, "tolerance=0.1 is given"),
    ],
)
def test_bad_sets_of_interventions_are_refused(several, options, says, monkeypatch) -> None:
    monkeypatch.setattr("patchsweep.sweeps.api.select_runner", None)
    with pytest.raises(PatchsweepError, match=says):
        ps.sweep(model(NAME), pairs_of(NAME, 1), "z", intervention=several, **options)


def test_the_command_line_runs_several(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "model=tiny", "task=ioi_demo", "sites=z", "sites.layers=[1]", "store=s.zarr"]
    key = "intervention={none:zero,half:scale(0.5),seven:0.7}"
    assert main([*words, key]) == EXIT_DONE
    ds = ps.open_store("s.zarr")
    pairs = ps.load_task(model(NAME), "ioi_demo")
    given = {"none": "zero", "half": ps.Scale(0.5), "seven": 0.7}
    expected = ps.sweep(model(NAME), pairs, "z", layers=[1], intervention=given)
    assert [*ds["intervention"].values] == [*given]
    np.testing.assert_array_equal(ds["z"].values, expected["z"].values)
    alone = ps.sweep(model(NAME), pairs, "z", layers=[1], intervention=ps.Scale(0.5))
    assert main([*words[:-1], "store=h.zarr", "intervention=scale(0.5)"]) == EXIT_DONE
    np.testing.assert_array_equal(ps.open_store("h.zarr")["z"].values, alone["z"].values)
    capsys.readouterr()
    assert main([*words, key.replace("0.5", "0.25")]) == EXIT_MISTAKE
    assert "intervention.half is scale, factor=0.25" in capsys.readouterr().err
    assert main(["verify", "s.zarr"]) == EXIT_DONE
    assert main(["verify", "s.zarr", "model=tiny", "task=ioi_demo"]) == EXIT_MISTAKE
    assert "holds several interventions" in capsys.readouterr().err
    assert main(["verify", "h.zarr", "model=tiny", "task=ioi_demo", "-n", "3"]) == EXIT_DONE
    assert "3 run again" in capsys.readouterr().out
