"""The command line: stores of files that were edited, functions with versions, and one default."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from omegaconf import DictConfig
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.edges import screen_edges
from patchsweep.analyses.heads import study
from patchsweep.analyses.logit_lens import lens
from patchsweep.attribution import get_methods
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.attention import AttentionRun
from patchsweep.cli.circuit import CircuitRun
from patchsweep.cli.edges import EdgesRun
from patchsweep.cli.heads import HeadsRun
from patchsweep.cli.lens import LensRun
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE, main
from patchsweep.cli.schema.run import RunConfig
from patchsweep.sweeps.api import sweep
from patchsweep.sweeps.screen_settings import Screen

RECORD = {
    "clean": "When John and Mary went to the park, John gave a bottle of milk to",
    "corrupted": "When John and Mary went to the park, Mary gave a bottle of milk to",
    "answer": " Mary",
    "wrong_answer": " John",
    "labels": {"place": "went to the park"},
}
# verb -> what it is told, and how the file is edited between two calls
VERBS: dict[str, tuple[list[str], list[str]]] = {
    "run": (
        ["sites=[z]", "sites.layers=[1]", "intervention=mean_label"],
        ["prompts", "answers", "labels"],
    ),
    "edges": (["top=2"], ["answers"]),
    "circuit": (["sizes=[2]"], ["prompts"]),
    "lens": (["sublayers=false"], ["labels"]),
    "heads": (["ablations=[resample,zero]"], ["prompts"]),
    "attention": (["top=1"], ["labels"]),
}
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": (
        {key: RECORD[key].replace("park", "shops") for key in ("clean", "corrupted")}  # type: ignore[attr-defined]
        | {"labels": {"place": "went to the shops"}},
        "the clean prompts and corrupted prompts differ, first in pair 0",
    ),
    "answers": ({"answer": " Tom"}, "the answers differ, first in pair 0"),
    "labels": ({"labels": {"place": "gave a bottle of"}}, "the labels differ, first in pair 0"),
}


def patchsweep(*words: str) -> int:
    return main(list(words))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(changes: dict[str, Any]) -> None:
    Path("pairs.jsonl").write_text(json.dumps({**RECORD, **changes}) + "\n")


@pytest.mark.parametrize("verb", VERBS)
def test_store_of_an_edited_file_is_refused(
    verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, edits = VERBS[verb]
    words = [verb, "model=tiny", "task=pairs.jsonl", "store=a.zarr", *told]
    write({})
    assert patchsweep(*words) == EXIT_DONE
    for edit in edits:
        changes, difference = EDITS[edit]
        write(changes)
        capsys.readouterr()
        assert patchsweep(*words) == EXIT_MISTAKE
        assert difference in capsys.readouterr().err
    write({})
    assert patchsweep(*words) == EXIT_DONE


def test_metric_of_the_user_needs_a_version_and_is_known_by_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "identity_metrics.py").write_text(
        "class Nth:\n"
        "    def __init__(self, at=0):\n        self.at = at\n"
        "    def __call__(self, logits):\n        return logits[:, 0, self.at]\n"
    )
    monkeypatch.syspath_prepend(here)
    write({})

    def run(given: str, store: str = "a.zarr", *, verb: str = "run") -> tuple[int, str]:
        own = f"metric.names=[{{_target_: identity_metrics.Nth, {given}}}]"
        capsys.readouterr()
        words = [verb, "model=tiny", "task=pairs.jsonl", f"store={store}", *VERBS[verb][0], own]
        return patchsweep(*words), capsys.readouterr().err

    for verb in ("run", "edges"):
        code, err = run("at: 1", verb=verb)
        assert code == EXIT_MISTAKE
        assert "Nth, at=1, without a version: a store must know which function" in err
        assert not Path("a.zarr").exists()
    assert run("at: 1, name: nth, version: 1")[0] == EXIT_DONE
    assert list(xr.open_zarr("a.zarr", consolidated=False).metric.values) == ["nth"]
    code, err = run("at: 2, name: nth, version: 1")
    assert code == EXIT_MISTAKE
    assert "metrics[0] is nth, at=2, version 1 in this run and nth, at=1, version 1 in" in err


# One set of defaults

CONFIGS: dict[str, tuple[type[RunConfig], Callable[..., Any], dict[str, str]]] = {
    # key of the config -> argument of the function
    "edges": (
        EdgesRun,
        screen_edges,
        {"top": "top", "positions": "positions", "steps": "steps", "rule": "rule", "rtol": "rtol"},
    ),
    "circuit": (
        CircuitRun,
        circuit,
        {"level": "level", "growth": "growth", "sizes": "sizes", "ablation": "ablation"},
    ),
    "lens": (LensRun, lens, {"which": "which", "remove": "remove", "top": "top"}),
    "heads": (HeadsRun, study, {"optimal": "optimal", "thresholds": "thresholds"}),
    "attention": (
        AttentionRun,
        attention,
        {"top": "top", "heads": "heads", "predictions": "predictions"},
    ),
    "run": (
        RunConfig,
        sweep,
        {
            "intervention": "intervention",
            "direction": "direction",
            "precision": "precision",
            "metric.read": "read",
            "runner.name": "runner",
            "runner.max_tokens": "max_tokens",
            "runner.cache_budget": "cache_budget",
            "slice": "slice_index",
            "n_slices": "n_slices",
        },
    ),
}


def composed(verb: str, *words: str, schema: type[RunConfig] = RunConfig) -> RunConfig:
    found: list[RunConfig] = []

    def keep(cfg: DictConfig) -> None:
        found.append(as_config(cfg))

    compose(verb, ["task=ioi_demo", *words], keep, schema=schema)
    return found[0]


@pytest.mark.parametrize("verb", CONFIGS)
def test_command_line_has_the_defaults_of_python(verb: str, here: Path) -> None:
    schema, function, keys = CONFIGS[verb]
    config = composed(verb, schema=schema)
    defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    for key, argument in keys.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == defaults[argument], key


@pytest.mark.parametrize("name", ["ig", "ig_inputs", "screen"])
def test_method_means_the_same_however_it_is_written(name: str, here: Path) -> None:
    (asked,) = composed("run", f"method={name}").method.methods()
    assert composed("run", f"method=[{name}]").method.methods() == [name]
    if name == "screen":
        assert asked == Screen()
    else:
        assert get_methods([asked]) == get_methods([name])  # type: ignore[list-item]
