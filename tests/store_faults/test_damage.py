"""Each kind of file lost, emptied, cut, flipped, swapped, linked, unreadable: what the verbs say.

None of it may leave a wrong or missing value called complete. The same run mends it, or says in one
line what to do. PATCHSWEEP_FAULT_TABLE=docs/faults.md writes what happened (see `conftest`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.analyses.logit_lens import lens
from patchsweep.analyses.stages import Stages
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_MISTAKE
from patchsweep.cli.verify import EXIT_PROBLEMS
from patchsweep.errors import StoreError
from patchsweep.report import write_report
from patchsweep.store.backends.address import open_folder
from patchsweep.store.lease import Leases
from patchsweep.store.status import EXIT_INCOMPLETE
from store_checks import checksums
from subjects import demo_pairs, model
from test_means import pairs

Row = Callable[..., None]
NAME = "tiny:llama"


# ------------------------------------------------------------------------------- ways to damage


def _lost(path: Path, other: Path) -> None:
    path.unlink()


def _emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _flipped(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _swapped(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _linked(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _unreadable(path: Path, other: Path) -> None:
    """A folder lies in its place: root, who runs these tests, may read everything else."""
    path.unlink()
    path.mkdir()


WAYS = {
    "lost": _lost,
    "emptied": _emptied,
    "cut in half": _cut,
    "one bit flipped": _flipped,
    "replaced by its neighbour": _swapped,
    "replaced by a link": _linked,
    "replaced by a folder": _unreadable,
}

# kind of file -> where it lies in the store or beside it, and its neighbour; a star: any name
FILES = {
    "values of a unit": ("a.zarr/z/c.0.0.0.0.0", "a.zarr/z/c.0.1.0.0.0"),
    "flag of a unit": ("a.zarr/progress/z/c.0.0.0", "a.zarr/progress/z/c.1.0.0"),
    "unpatched metric": ("a.zarr/base_metric/c.0.1", "a.zarr/source_metric/c.0.1"),
    "flag of unpatched metrics": (
        "a.zarr/progress/references/c.1.0",
        "a.zarr/progress/references/c.2.0",
    ),
    "token strings": ("a.zarr/base_token/c.0.0", "a.zarr/answer/c.0"),
    "metric names": ("a.zarr/metric/c.0", "a.zarr/metric_unit/c.0"),
    "metadata of values": ("a.zarr/z/zarr.json", "a.zarr/base_metric/zarr.json"),
    "metadata of flags": ("a.zarr/progress/z/zarr.json", "a.zarr/progress/references/zarr.json"),
    "attributes": ("a.zarr/zarr.json", "a.zarr/progress/zarr.json"),
    "list of digests": ("a.zarr/progress/zarr.json", "a.zarr/progress/z/zarr.json"),
    "means": ("a.zarr.means/*.safetensors", "b.zarr.means/*.safetensors"),
    "journal": ("a.zarr.journal/*.jsonl", "b.zarr.journal/*.jsonl"),
    "lease of a dead process elsewhere": ("a.zarr.leases/units/z/0.0@0", "a.zarr/zarr.json"),
    "heartbeat of a dead process elsewhere": ("a.zarr.leases/owners/*", "a.zarr/zarr.json"),
}
BESIDE = {kind for kind, (path, _) in FILES.items() if not path.startswith("a.zarr/")}
QUICK = {"values of a unit", "unpatched metric", "attributes", "list of digests"}
RESULTS = {
    "results of an analysis": ("l.zarr/answer_prob/c/0/0/0/0/0", "l.zarr/wrong_prob/c/0/0/0/0/0"),
    "their metadata": ("l.zarr/answer_prob/zarr.json", "l.zarr/answer_pos/zarr.json"),
    "their attributes": ("l.zarr/zarr.json", "l.zarr/progress/zarr.json"),
    "their list of digests": ("l.zarr/progress/zarr.json", "l.zarr/zarr.json"),
}


def cases(files: dict[str, tuple[str, str]], quick: set[str]) -> list[Any]:
    """Every kind with every way; those in `quick`, and a flipped bit in each, run always."""
    return [
        pytest.param(kind, way, id=f"{kind}-{way}".replace(" ", "-"))
        if kind in quick or way == "one bit flipped"
        else pytest.param(kind, way, id=f"{kind}-{way}".replace(" ", "-"), marks=pytest.mark.slow)
        for kind in files
        for way in WAYS
    ]


def sweep(store: Path, intervention: str = "mean") -> xr.Dataset:
    common = {"layers": [0, 2], "positions": [11, 15], "intervention": intervention}
    return ps.sweep(model(NAME), pairs(), "z", store=store, **common)


@cache
def looked() -> xr.Dataset:
    return lens(model(NAME), demo_pairs(NAME))


def look(store: Path) -> bool:
    """What `patchsweep lens` does with its store; whether the results were there already."""
    stages = Stages(store)
    lens(model(NAME), demo_pairs(NAME), stages=stages)
    return stages.known


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units, and short leases."""
    monkeypatch.setattr("patchsweep.spec.shards.UNIT_TOKENS", 20)
    monkeypatch.setattr("patchsweep.store.lease.EXPIRY_S", 0.2)
    monkeypatch.setattr("patchsweep.sweeps.executor.WAIT_S", 0.05)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stores, what lies beside them, and their pages."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchsweep.spec.shards.UNIT_TOKENS", 20)
        sweep(folder / "a.zarr")
        sweep(folder / "b.zarr", "mean_all")
    look(folder / "l.zarr")
    for name in "al":
        write_report(folder / f"{name}.zarr", folder / f"{name}.html")
    return folder


def damage(sound: Path, here: Path, files: tuple[str, str], way: str) -> None:
    """A copy of `sound` with one file damaged."""
    shutil.copytree(sound, here, dirs_exist_ok=True)
    if "leases" in files[0]:  # of a unit that is not done yet
        (here / "a.zarr/progress/z/c.0.0.0").unlink()
        lease = Leases(open_folder(here / "a.zarr").beside(".leases"))
        lease.owner = "elsewhere.01234567-1-1~ab"
        lease._content = json.dumps({"owner": lease.owner}).encode()
        assert lease.claim(["z/0.0"])
    (path,), (other,) = (list(here.glob(file)) for file in files)
    before = path.read_bytes()
    WAYS[way](path, other)
    assert path.is_symlink() or not path.is_file() or path.read_bytes() != before


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code of a verb, and the line that matters; no verb ends in a traceback."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    lines = (told.out + told.err).replace(str(words[1]), "STORE").splitlines()
    assert "Traceback" not in told.err, told.err
    assert code != 1
    marks = ("PROBLEM ", "damaged: ", "STORE is damaged", "patchsweep: ")
    chosen = [line for line in lines if line.startswith(marks)] or lines[-1:]
    told = chosen[0].removeprefix("PROBLEM ").removeprefix("patchsweep: ")
    return code, re.sub(r"[\d.,e+]+ (token-layers|units) per second", r"... \1 per second", told)


@pytest.mark.parametrize(("kind", "way"), cases(FILES, QUICK))
def test_damage_to_a_sweep_is_told_and_mended(
    kind: str, way: str, sound: Path, tmp_path: Path, capsys: Any, damaged_row: Row
) -> None:
    damage(sound, tmp_path, FILES[kind], way)
    store, page = tmp_path / "a.zarr", tmp_path / "page.html"
    started = "dead process" in kind
    status, told_status = say(capsys, "status", store)
    verify, told_verify = say(capsys, "verify", store)
    report, told_report = say(capsys, "report", store, "-o", page)
    if kind not in BESIDE or started:
        assert verify in (EXIT_INCOMPLETE, EXIT_PROBLEMS)
        same_length = way in ("one bit flipped", "replaced by its neighbour")
        assert status == EXIT_INCOMPLETE or (same_length and "verify" in told_status)
    else:
        assert status == 0
        gone = way in ("lost", "replaced by a folder")  # means are made anew if need be
        assert verify == (EXIT_PROBLEMS if kind == "means" and not gone else 0)
    if report == 0:
        text = page.read_text()
        told_report = "the page"
        if text != (sound / "a.html").read_text():
            told_report = "the page, without what the run cost"
            if kind != "journal":
                told_report = "called unfinished"
                assert "This run is unfinished" in text
    try:
        sweep(store)
        told_run = "as before the damage"
        assert checksums(store) == checksums(sound / "a.zarr")
        assert say(capsys, "verify", store)[0] == 0
    except StoreError as error:
        told_run = str(error).replace(str(tmp_path), "").replace(str(store), "STORE")
        assert "delete it" in told_run
        assert "\n" not in told_run
    damaged_row(kind, way, told_status, told_verify, told_run, told_report)


@pytest.mark.parametrize(
    "files",
    [
        ("z_atp/c.*", "z_relp/c.*"),
        ("base_metric/c.0.0", "source_metric/c.0.0"),
        ("answer/c.0", "wrong_answer/c.0"),
        ("metric/c.0", "metric_unit/c.0"),
    ],
    ids=["estimates", "metrics", "answers", "labels"],
)
def test_two_files_that_change_places_are_told_and_mended(
    files: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    """Each is sound by itself, in the other's place it is not."""
    store = tmp_path / "a.zarr"

    def write() -> None:
        ps.sweep(
            model(NAME), pairs(), "z", ["prob", "logit"], layers=[0, 2], positions=[11, 15],
            method=["exact", "atp", "relp"], store=store,
        )  # fmt: skip

    write()
    before = checksums(store)
    one, other = (sorted(store.glob(file))[0] for file in files)
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    one.write_bytes(second)
    other.write_bytes(first)
    code, told = say(capsys, "verify", store)
    assert code == EXIT_PROBLEMS
    assert "run the command that wrote the store again" in told
    write()
    assert checksums(store) == before


@pytest.mark.parametrize(("kind", "way"), cases(RESULTS, {"results of an analysis"}))
def test_damage_to_results_of_an_analysis_is_told(
    kind: str, way: str, sound: Path, tmp_path: Path, capsys: Any, damaged_row: Row
) -> None:
    damage(sound, tmp_path, RESULTS[kind], way)
    store = tmp_path / "l.zarr"
    status, told_status = say(capsys, "status", store)
    verify, told_verify = say(capsys, "verify", store)
    report, told_report = say(capsys, "report", store, "-o", tmp_path / "page.html")
    assert status in (EXIT_INCOMPLETE, EXIT_MISTAKE)
    assert verify in (EXIT_PROBLEMS, EXIT_MISTAKE)
    assert report == EXIT_MISTAKE
    with pytest.raises(StoreError, match="delete") as caught:
        look(store)
    told_run = str(caught.value).replace(str(store), "STORE")
    assert "\n" not in told_run
    damaged_row(kind, way, told_status, told_verify, told_run, told_report)
    shutil.rmtree(store)
    assert not look(store)
    assert checksums(store) == checksums(sound / "l.zarr")
