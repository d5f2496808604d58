"""A store is data: one that was made to do harm runs nothing, and reads no environment and no file.

Each case is a sound store changed by somebody who knows its format: digests and flags are made
anew. Every verb then has a go at it. None may import, call or resolve what the store names, open a
file outside, connect to anything, or show a secret; none may end in a traceback.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import zarr
from omegaconf import OmegaConf
from patchsweep.cli import main
from patchsweep.cli.schema.run import ModelConfig
from patchsweep.errors import StoreError
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.contents import read_contents
from patchsweep.store.digest import seal
from patchsweep.store.layout import COMPLETE, FIXED, fixed_key, references_key, with_digests
from patchsweep.store.shard import ShardForm
from subjects import model

MADE = ["model=tiny", "task=ioi_demo"]
RUN = [*MADE, "sites=[z]", "method=[exact,atp]", "metric=logit_diff"]
SECRET = "hunter2-hunter2"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
Forge = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.zarr"
    assert main(["run", *RUN, f"store={path}"]) == 0
    return path


# ----------------------------------------------------------------------------- forging a store


def edit(path: Path, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of the store, and all digests and flags with it."""
    found = json.loads((path / key).read_text())
    change(found)
    (path / key).write_text(json.dumps(found))
    reseal(path)


def edit_attrs(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def inner(root: dict[str, Any]) -> None:
        attrs = attributes(root["attributes"])
        change(attrs)
        root["attributes"] = flat_attributes(attrs)

    edit(path, "zarr.json", inner)


def config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_attrs(path, lambda attrs: change(attrs["provenance"]["config"]))


def reseal(path: Path) -> None:
    """Make digests and flags that fit what is there."""
    keys = json.loads((path / COMPLETE).read_text())["attributes"]["files"]
    files = {key: (path / key).read_bytes() for key in [*keys, COMPLETE]}
    (path / COMPLETE).write_bytes(with_digests(files)[COMPLETE])
    identity = read_contents(LocalFolder(path)).identity
    for flag in (path / "progress").glob("*/c.*"):
        name, index = flag.parent.name, flag.name.split(".")[1:-1]
        if name == "references":
            shards = [fixed_key(metric, int(index[0])) for metric in FIXED]
        else:
            found = (path / name).glob(f"c.0.{index[0]}.{index[1]}*")
            shards = [f"{name}/{shard.name}" for shard in found]
        sealed = [seal(identity, key, (path / key).read_bytes()) for key in shards]
        flag.write_bytes(b"".join(sealed))


# ------------------------------------------------------------------------------- what it names


def names_remote_code(path: Path) -> None:
    config(path, lambda c: c["model"].update(name="evil/model", trust_remote_code=True))


def names_a_target(path: Path) -> None:
    target = {"_target_": "evil_module.run", "_args_": ["${oc.env:PATCHSWEEP_CANARY}"]}
    config(path, lambda c: c["metric"].update(names=["logit_diff", target]))


def names_builtins(path: Path) -> None:
    target = {"_target_": "builtins.open", "file": str(path.parent / "ran"), "mode": "w"}
    config(path, lambda c: c["metric"].update(names=[target]))


def reads_the_environment(path: Path) -> None:
    def change(c: dict[str, Any]) -> None:
        c["task"] = {"path": "${oc.env:PATCHSWEEP_CANARY}/pairs.jsonl"}
        c["model"]["name"] = "${oc.env:PATCHSWEEP_CANARY}"
        c["sites"]["positions"] = ["${oc.env:PATCHSWEEP_CANARY}"]
        c["intervention"] = "${oc.env:PATCHSWEEP_CANARY}"

    config(path, change)


def names_a_file(path: Path) -> None:
    config(path, lambda c: c.update(task={"path": str(path.parent / "secret.txt")}))


def has_attributes_of_other_kinds(path: Path) -> None:
    def change(attrs: dict[str, Any]) -> None:
        attrs.update(provenance=[1], plan={"z": [SCRIPT]}, identity=3, direction=[], screen="x")

    edit_attrs(path, change)


def has_deep_attributes(path: Path) -> None:
    edit(
        path, "zarr.json", lambda r: r["attributes"].update(plan="[" * 100_000, provenance="{" * 9)
    )


def has_scripts_for_text(path: Path) -> None:
    def change(attrs: dict[str, Any]) -> None:
        attrs["provenance"].update(model=SCRIPT, runner=SCRIPT, runner_reason="\x1b[2J" + SCRIPT)
        attrs.update(direction=SCRIPT, intervention=SCRIPT, patchsweep_version=SCRIPT)

    edit_attrs(path, change)


def has_scripts_for_tokens(path: Path) -> None:
    group = zarr.open_group(path, mode="r+")
    for name in ("base_token", "source_token", "answer", "wrong_answer", "metric", "metric_unit"):
        values = np.asarray(group[name][...]).astype(object)
        values[...] = f"\x1b[2J{SCRIPT}\u202e"
        group[name][...] = values
    reseal(path)


def is_of_an_unknown_analysis(path: Path) -> None:
    edit_attrs(path, lambda attrs: attrs.update(kind="../../evil_module"))


# -------------------------------------------------------------------------------------- names


def lists_a_file_outside(path: Path) -> None:
    edit_complete(path, lambda names: names["files"].update({"../secret.txt": "0" * 64}))


def lists_an_absolute_file(path: Path) -> None:
    edit_complete(path, lambda names: names["files"].update({"/etc/passwd": "0" * 64}))


def names_a_variable_outside(path: Path) -> None:
    edit_complete(path, lambda names: names["variables"].append("../outside"))


def edit_complete(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((path / COMPLETE).read_text())
    change(found["attributes"])
    (path / COMPLETE).write_text(json.dumps(found))


# ----------------------------------------------------------------------------- zarr's metadata


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (eval, (f"open({str(self.path)!r}, 'w')",))


def is_zarr_2_with_pickles(path: Path) -> None:
    evil = pickle.dumps(np.array([Evil(path.parent / "ran")], dtype=object))
    shutil.rmtree(path)
    (path / "z").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None}
    array |= {"order": "C", "compressor": None, "filters": [{"id": "pickle"}]}
    (path / "z" / ".zarray").write_text(json.dumps(array))
    (path / "z" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["pair"]}')
    (path / "z" / "0").write_bytes(evil)


def names_a_codec(path: Path) -> None:
    edit(path, "z/zarr.json", lambda m: m.update(codecs=[{"name": "evil_codec"}]))


def hides_a_codec(path: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "evil_codec"})

    edit(path, "z/zarr.json", change)


def names_a_codec_of_text(path: Path) -> None:
    edit(path, "answer/zarr.json", lambda m: m["codecs"].insert(0, {"name": "evil_codec"}))


def names_a_data_type(path: Path) -> None:
    edit(path, "z/zarr.json", lambda m: m.update(data_type={"name": "evil", "configuration": {}}))


def claims_a_huge_shape(path: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        metadata["shape"][1] = 2**39

    edit(path, "z/zarr.json", change)


def has_consolidated_metadata(path: Path) -> None:
    inner = {"z": {"zarr_format": 3, "node_type": "array", "codecs": [{"name": "evil_codec"}]}}
    edit(path, "zarr.json", lambda r: r.update(consolidated_metadata={"metadata": inner}))


# ------------------------------------------------------------------------------ chunks, links


def has_a_shard_of_lies(path: Path) -> None:
    (shard,) = (path / "z").glob("c.*")
    lies = np.array([2**40, 2**50], "<u8").tobytes()
    shard.write_bytes(os.urandom(40) + lies + b"\0\0\0\0")
    reseal(path)


def has_a_shard_that_swells(path: Path) -> None:
    from numcodecs.zstd import compress

    (shard,) = (path / "z").glob("c.*")
    frame = compress(bytes(200_000_000), 3)
    index = np.array([0, len(frame)], "<u8").tobytes()
    shard.write_bytes(frame + index + b"\0\0\0\0")
    reseal(path)


def links_values_to_a_file(path: Path) -> None:
    (shard,) = (path / "z").glob("c.*")
    shard.unlink()
    shard.symlink_to(path.parent / "secret.txt")


def links_attributes_to_a_file(path: Path) -> None:
    (path / "zarr.json").rename(path.parent / "root.json")
    (path / "zarr.json").symlink_to(path.parent / "root.json")


def links_a_folder(path: Path) -> None:
    shutil.rmtree(path.parent / "moved", ignore_errors=True)
    (path / "z").rename(path.parent / "moved")
    (path / "z").symlink_to(path.parent / "moved")


def links_the_journal(path: Path) -> None:
    shutil.rmtree(path.with_name("a.zarr.journal"))
    path.with_name("a.zarr.journal").symlink_to(path.parent / "outside")


def links_the_leases(path: Path) -> None:
    shutil.rmtree(path.with_name("a.zarr.leases"), ignore_errors=True)
    path.with_name("a.zarr.leases").symlink_to(path.parent / "outside")


def has_pipes_and_devices(path: Path) -> None:
    (shard,) = (path / "z").glob("c.*")
    shard.unlink()
    os.mkfifo(shard)  # whoever opens it waits for ever
    (path / "answer" / "c.0").unlink()
    os.symlink("/dev/zero", path / "answer" / "c.0")


# ------------------------------------------------------------------------- journal and leases


def has_a_journal_of_lies(path: Path) -> None:
    lines = [
        {"event": "started", "time": 1e308, "slice": {"a": 1}, "n_slices": SCRIPT},
        {"event": "unit", "time": 2, "variable": [], "pair_block": {}, "layer_block": 0},
        {"event": "unit", "time": 1, "variable": SCRIPT, "pair_block": 0, "layer_block": 0}
        | {"seconds": float("nan"), "token_layers": 10**400, "n_live": 1},
        {"event": "warning", "time": 3, "text": f"\x1b[2J\x07{SCRIPT}"},
    ]
    text = "\n".join(["[" * 100_000, '{"event": "unit"', *map(json.dumps, lines)])
    (path.with_name("a.zarr.journal") / "-0-0.jsonl").write_text(text)


def has_leases_of_lies(path: Path) -> None:
    units = path.with_name("a.zarr.leases") / "units" / "z"
    units.mkdir(parents=True, exist_ok=True)
    for i, owner in enumerate(("../../secret.txt", f"{'9' * 99}-1-1~ab", ["x"], SCRIPT)):
        (units / f"0.0@{i}").write_text(json.dumps({"owner": owner}))


HOSTILE: list[Forge] = [
    *(names_remote_code, names_a_target, names_builtins, reads_the_environment, names_a_file),
    *(has_attributes_of_other_kinds, has_deep_attributes, has_scripts_for_text),
    *(
        has_scripts_for_tokens,
        is_of_an_unknown_analysis,
        lists_a_file_outside,
        lists_an_absolute_file,
    ),
    *(names_a_variable_outside, is_zarr_2_with_pickles, names_a_codec, hides_a_codec),
    *(names_a_codec_of_text, names_a_data_type, claims_a_huge_shape, has_consolidated_metadata),
    *(has_a_shard_of_lies, has_a_shard_that_swells, links_values_to_a_file),
    *(links_attributes_to_a_file, links_a_folder, links_the_journal, links_the_leases),
    *(has_pipes_and_devices, has_a_journal_of_lies, has_leases_of_lies),
]


# -------------------------------------------------------------------------------------- guards

_opened: list[str] = []
_watching = [False]


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching[0] and event == "open" and isinstance(args[0], str | os.PathLike):
        _opened.append(os.fspath(args[0]))


sys.addaudithook(_watch)


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place beside which secrets and traps lie; what is caught in them fails the test."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATCHSWEEP_CANARY", SECRET)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)

    def connect(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    load = ModelConfig.load

    def loaded(config: ModelConfig) -> Any:
        """The one of the command line, kept; any other is loaded as the store would have it."""
        return model("tiny:llama") if config.name == "tiny:llama" else load(config)

    monkeypatch.setattr(ModelConfig, "load", loaded)
    asked: list[str] = []
    told = lambda *names: asked.append(str(names)) or ""  # noqa: E731
    OmegaConf.register_new_resolver("oc.env", told, replace=True)
    from zarr.registry import register_codec

    class EvilCodec:
        @classmethod
        def from_dict(cls, data: Any) -> Any:
            (tmp_path / "ran").write_text("codec")
            raise AssertionError("the codec of the store was made")

    register_codec("evil_codec", EvilCodec)  # as an installed package may
    _opened.clear()
    _watching[0] = True
    yield tmp_path
    _watching[0] = False
    assert not (tmp_path / "ran").exists()
    assert "evil_module" not in sys.modules
    assert asked == []
    assert not [path for path in _opened if path.endswith(("secret.txt", "/etc/passwd"))]
    assert not any((tmp_path / "outside").iterdir())


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr()
    return told.out + told.err


VERBS = {
    "status": ["status", "STORE"],
    "verify": ["verify", "STORE"],
    "verify-again": ["verify", "STORE", "-n", "2", *MADE],
    "compare": ["compare", "STORE"],
    "compare-again": ["compare", "STORE", "--sample", "2", *MADE],
    "report": ["report", "STORE", "-o", "page.html"],
    "run": ["run", *RUN, "store=STORE"],
    "lens": ["lens", *MADE, "store=STORE"],
    "attention": ["attention", *MADE, "store=STORE"],
    "edges": ["edges", *MADE, "store=STORE"],
    "circuit": ["circuit", *MADE, "store=STORE"],
    "heads": ["heads", *MADE, "store=STORE"],
}


# one of each kind; the others are among the slow tests, and all are read in Python below
QUICK = {
    *(names_remote_code, names_a_target, reads_the_environment, has_attributes_of_other_kinds),
    *(has_scripts_for_tokens, lists_a_file_outside, is_zarr_2_with_pickles, hides_a_codec),
    *(has_a_shard_of_lies, links_a_folder, has_pipes_and_devices, has_a_journal_of_lies),
}


def name_of(forge: Forge) -> str:
    return forge.__name__.replace("_", "-")


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(forge, id=name_of(forge), marks=() if forge in QUICK else pytest.mark.slow)
        for forge in HOSTILE
    ],
)
def test_a_hostile_store_runs_nothing_and_reads_nothing(
    forge: Forge, sound: Path, guarded: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(guarded)
    for verb, words in VERBS.items():
        _watching[0] = False
        for path in guarded.glob("a.zarr*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for suffix in ("", ".journal", ".leases"):
            shutil.copytree(f"{sound}{suffix}", guarded / f"a.zarr{suffix}")
        forge(guarded / "a.zarr")
        _watching[0] = True
        capsys.readouterr()
        code = main([word.replace("STORE", "a.zarr") for word in words])
        told = shown(capsys)
        assert code != 1, (verb, told)  # no traceback
        assert "Traceback" not in told, verb
        assert SECRET not in told, verb
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", told), verb
        if code == 2:
            assert len(told.strip().splitlines()[-1]) < 1500, verb
    page = guarded / "page.html"
    if page.exists():
        text = page.read_text()
        assert SECRET not in text
        assert SCRIPT not in text
        assert "<img src=x" not in text


@pytest.mark.parametrize("forge", HOSTILE, ids=name_of)
def test_reading_a_hostile_store_in_python_runs_nothing(
    forge: Forge, sound: Path, guarded: Path
) -> None:
    for suffix in ("", ".journal", ".leases"):
        shutil.copytree(f"{sound}{suffix}", guarded / f"a.zarr{suffix}")
    forge(guarded / "a.zarr")
    with suppress(StoreError):
        ps.open_store(guarded / "a.zarr").load()


def test_values_are_decoded_into_the_space_that_they_need() -> None:
    from numcodecs.zstd import compress

    form = ShardForm((2, 3), None)
    with pytest.raises(ValueError, match="zstd"):
        form.decode(compress(bytes(10_000_000), 3))
    for size in (0, 5, 24, 100):
        with pytest.raises(ValueError, match=r"zstd|too few|inner chunk"):
            ShardForm((2, 3), (1, 3)).decode(os.urandom(size))


def test_forged_stores_are_otherwise_sound(sound: Path, tmp_path: Path) -> None:
    """Without the harm in it a forged store is taken: what is refused is the harm."""
    shutil.copytree(sound, tmp_path / "a.zarr")
    edit_attrs(tmp_path / "a.zarr", lambda attrs: attrs.update(note="hello"))
    ds = ps.open_store(tmp_path / "a.zarr").load()
    assert ds.attrs["note"] == "hello"
    assert main(["verify", str(tmp_path / "a.zarr")]) == 0
    zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert (tmp_path / "a.zarr" / references_key(0)).exists()
