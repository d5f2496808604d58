"""Data in and out: tables of pairs in five formats, results as DataFrame, Parquet and netCDF."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.records import REQUIRED
from patchsweep.errors import ConfigError, PromptError, SiteError
from patchsweep.results import accessor as summary
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from test_grammar import composed
from test_sweep import mixed_pairs

NAME = "tiny:llama"
ROWS = [
    {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong_answer": " John"},
    {
        "clean": 'Then Paul said "hello, Anna"\nand Anna gave a ring to',
        "corrupted": 'Then Paul said "hello, Anna"\nand Paul gave a ring to',
        "answer": " Paul",
        "wrong_answer": " Anna",
    },
]
LABELS = [{"place": "shops"}, {"gift": "ring"}]
NAMES = {"clean": "prompt", "wrong_answer": "foil", "labels.place": "where"}


def table(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write rows in the format that the path's ending, or `saved`, says."""
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(rows).to_parquet(path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    return path


FORMATS = ["pairs.jsonl", "pairs.csv", "pairs.tsv", "pairs.parquet", "saved"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    expected = PromptPairs.from_rows(
        model(NAME), [{**r, "labels": x} for r, x in zip(ROWS, LABELS, strict=True)]
    )
    labels = LABELS if name == "pairs.jsonl" else map(json.dumps, LABELS)
    rows = [{**row, "labels": text} for row, text in zip(ROWS, labels, strict=True)]
    assert PromptPairs.from_file(model(NAME), table(rows, tmp_path / name)) == expected
    assert [set(pair.labels) for pair in expected] == [{"place"}, {"gift"}]


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_found_by_the_names_that_are_given(name: str, tmp_path: Path) -> None:
    rows = [
        {**{NAMES.get(key, key): text for key, text in row.items()}, "where": where, "note": "x"}
        for row, where in zip(ROWS, ("shops", ""), strict=True)
    ]
    path = table(rows, tmp_path / name)
    found = PromptPairs.from_file(model(NAME), path, columns=NAMES)
    assert [list(pair.labels) for pair in found] == [["place"], []]
    plain = PromptPairs.from_rows(model(NAME), ROWS)
    assert [pair.clean for pair in found] == [pair.clean for pair in plain]
    assert [pair.wrong_answer for pair in found] == [pair.wrong_answer for pair in plain]
    with pytest.raises(PromptError, match=r"(row 0|line 1|line 2): key 'clean' is required"):
        PromptPairs.from_file(model(NAME), path)


def test_frames_datasets_and_lists_are_rows() -> None:
    datasets = pytest.importorskip("datasets")
    expected = PromptPairs.from_rows(model(NAME), ROWS)
    for rows in (pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS), iter(ROWS)):
        assert PromptPairs.from_rows(model(NAME), rows) == expected


def test_a_parquet_struct_of_labels_leaves_out_what_is_null(tmp_path: Path) -> None:
    rows = [{**row, "labels": places} for row, places in zip(ROWS, LABELS, strict=True)]
    pairs = PromptPairs.from_file(model(NAME), table(rows, tmp_path / "pairs.parquet"))
    assert [list(pair.labels) for pair in pairs] == [["place"], ["gift"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clean,corrupted,answer,wrong_answer\na,b,c\n", "line 2: the line must have as many"),
        ("clean,corrupted,answer,wrong_answer\na,b,c,d,e\n", "line 2: the line must have as many"),
        ('clean,corrupted,answer,wrong_answer\n"a,b,c,d\n', "unexpected end of data"),
        ("clean,corrupted,answer\na,b,c\n", "line 2: key 'wrong_answer' is required"),
        (f"{','.join(REQUIRED)},labels\na,b,c,d,[1]\n", "labels must be an object of names"),
        ("clean,corrupted,answer,wrong_answer\n", "at least one prompt pair, got 0"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(PromptError, match=words):
        PromptPairs.from_file(model(NAME), path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "bad.parquet").write_text("text")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, str]] = [
        ("pairs.xlsx", "is no table of pairs that can be read"),
        ("none.csv", "could not be read"),
        ("bad.parquet", "give a Parquet file"),
        ("empty", "give a folder that Dataset.save_to_disk wrote"),
        ("splits", "holds the splits train; name one"),
    ]
    for name, words in cases:
        with pytest.raises(PromptError, match=words):
            PromptPairs.from_file(model(NAME), tmp_path / name)
    assert len(PromptPairs.from_file(model(NAME), tmp_path / "splits" / "train")) == 2
    with pytest.raises(PromptError, match="rows must be a list of mappings"):
        PromptPairs.from_rows(model(NAME), "pairs.csv")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="columns has 'prompt'"):
        PromptPairs.from_rows(model(NAME), ROWS, columns={"prompt": "clean"})
    with pytest.raises(PromptError, match=r"column 'q' \(for 'clean'\) is required"):
        PromptPairs.from_rows(model(NAME), ROWS, columns={"clean": "q"})


def test_the_command_line_reads_tables_too(tmp_path: Path) -> None:
    rows = [{"prompt": row["clean"], "who": "John", **row} for row in ROWS[:1]]
    path = table(rows, tmp_path / "pairs.csv")
    words = ("task.columns.clean=prompt", "task.columns.labels.place=corrupted")
    with pytest.raises(PromptError, match="must be a substring of the clean prompt"):
        composed(f"task={path}", *words).task.load(model(NAME))
    found = composed(f"task={path}", words[0]).task.load(model(NAME))
    assert found == demo_pairs(NAME)


def test_means_can_be_taken_from_a_table(tmp_path: Path) -> None:
    path = table(ROWS[:1], tmp_path / "pairs.csv")
    with pytest.raises(ConfigError, match="needs 4 behind each"):
        ps.plan(model(NAME), demo_pairs(NAME), "z", intervention="mean", means_from=path)


# Out


@pytest.fixture(scope="module")
def ds() -> xr.Dataset:
    pairs = mixed_pairs()
    return ps.sweep(model(NAME), pairs, ["resid_pre", "z"], method=["exact", "atp"])


def test_a_dataframe_has_a_row_for_each_cell_that_has_run(ds: xr.Dataset) -> None:
    frame = ds.patchsweep.to_dataframe()
    assert set(frame["site"]) == {"resid_pre", "z", "resid_pre_atp", "z_atp"}
    heads = ds.patchsweep.to_dataframe("z")
    assert len(heads) == int(ds["z"].notnull().sum()) == int((frame["site"] == "z").sum())
    assert attributes(heads)["provenance"]["model"] == attributes(ds)["provenance"]["model"]
    for row in heads.sample(20, random_state=0).itertuples():
        at = {dim: getattr(row, dim) for dim in ("metric", "pair", "layer", "pos", "head")}
        assert row.value == ds["z"].sel(at).item()
        assert row.effect == summary.effect(ds, "z").sel(at).item()
        assert row.base_token == ds["base_token"].sel(pair=row.pair, pos=row.pos).item()
    top = heads[heads["pair"] == 1].nlargest(1, "effect").iloc[0]
    one = max(summary.largest(ds, "z", n=500, pair=1), key=lambda e: e.effect)
    assert (top["layer"], top["pos"], top["head"]) == (one.layer, one.pos, one.head)
    with pytest.raises(SiteError, match="site='q' is not in the store"):
        ds.patchsweep.to_dataframe("q")


def test_parquet_reads_back_as_the_dataframe(ds: xr.Dataset, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = ds.patchsweep.to_parquet(tmp_path / "effects.parquet")
    again, frame = pd.read_parquet(path), ds.patchsweep.to_dataframe()
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)
    assert again.attrs == frame.attrs
    with pytest.raises(ConfigError, match="cannot be written"):
        ds.patchsweep.to_parquet(tmp_path / "none" / "a.parquet")
    with pytest.raises(ConfigError, match="must be a file"):
        ds.patchsweep.to_parquet(tmp_path)


def test_netcdf_reads_back_as_the_dataset(ds: xr.Dataset, tmp_path: Path) -> None:
    ps.sweep(model(NAME), mixed_pairs(), "z", store=tmp_path / "z.zarr")
    for number, one in enumerate((ds, ps.open_store(tmp_path / "z.zarr"))):
        path = one.patchsweep.to_netcdf(tmp_path / f"{number}.nc")
        with xr.open_dataset(path) as again:
            assert attributes(again) == attributes(one)
            assert set(again.variables) == set(one.variables)
            for name, variable in one.variables.items():
                np.testing.assert_array_equal(again[name].values, variable.values)
            assert summary.largest(again, "z") == summary.largest(one, "z")
