"""Bad inputs over the whole public face: what runs them, and the page that shows the answers.

`bad_inputs.txt` holds them as data. `python tests/bad_inputs.py` writes docs/bad_inputs.md from
what each of them is answered; test_bad_inputs.py holds both against each other.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import patchsweep.transformer_lens as patching
import torch
import xarray as xr
from hydra._internal.hydra import Hydra
from patchsweep import PatchsweepError
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import (
    acdc,
    circuit,
    circuit_scores,
    edges,
    exact_edges,
    screen_edges,
)
from patchsweep.analyses.heads import study
from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.joint import interactions, run_patches
from patchsweep.analyses.latents import latents
from patchsweep.analyses.logit_lens import Patch, lens, sublayers
from patchsweep.analyses.tracing import Noise, trace
from patchsweep.attribution import IntegratedInputs, IntegratedSite
from patchsweep.cli import main
from patchsweep.cli.schema import run as run_config
from patchsweep.data.pairs import PromptPairs, PromptRecord
from patchsweep.models import load_model
from patchsweep.report import write_report
from patchsweep.results import accessor as summary
from patchsweep.results.compare import compare
from patchsweep.spec.dictionary import Dictionary
from patchsweep.spec.directions import Add, Project
from patchsweep.spec.interventions import Custom, Mean
from patchsweep.spec.metrics import Metric
from patchsweep.spec.spec import SweepSpec
from patchsweep.store.dataset import open_store
from patchsweep.store.status import store_status
from patchsweep.store.store import Store
from patchsweep.sweeps.api import plan, sweep
from patchsweep.sweeps.sample import sample_exact
from patchsweep.sweeps.screen_settings import Screen
from patchsweep.tasks import check_task, keep_answered, load_task, template_task
from subjects import CLEAN, CORRUPTED, demo_pairs, model

DATA = Path(__file__).with_suffix(".txt")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "bad_inputs.md"
COMMAND = "exit 2"  # the error of a command line
# what the calls use
FACE = (
    Add,
    Custom,
    Dictionary,
    IntegratedInputs,
    IntegratedSite,
    Mean,
    Metric,
    Noise,
    OptimalSettings,
    Project,
    Patch,
    PromptPairs,
    PromptRecord,
    Screen,
    Store,
    SweepSpec,
    Thresholds,
    acdc,
    attention,
    check_task,
    circuit,
    circuit_scores,
    compare,
    edges,
    exact_edges,
    interactions,
    latents,
    lens,
    load_model,
    keep_answered,
    load_task,
    template_task,
    open_store,
    plan,
    run_patches,
    sample_exact,
    screen_edges,
    store_status,
    study,
    sublayers,
    sweep,
    trace,
    write_report,
)
HEAD = """# Bad inputs

Each call and each command below is wrong in one way. It is answered as the table says, before any
module of the model has run and before any file is made or changed; tests/test_bad_inputs.py tries
them all. `m` is a model of three layers with four heads, `P` one prompt pair of 17 tokens, `ds` a
sweep of z, `a.zarr` its store, `b.zarr` one with estimates too, `lens.zarr` a lens, `folder` a
folder with a file in it, `D(w, l)` a dictionary of four latents of the width w at layer l; the
files hold what their names say. `python tests/bad_inputs.py` writes this page from
tests/bad_inputs.txt.
"""


@dataclass(frozen=True)
class Bad:
    """One bad input, and what must be said."""

    group: str  # what it is given to
    call: str  # a Python expression, or the words of a command line
    error: str  # the class of the error; `exit 2` of a command line
    words: tuple[str, ...]  # parts of the message: rule and value, remedy


@dataclass(frozen=True)
class Answer:
    """What became of a bad input."""

    error: str  # as `Bad.error`; another class with its module where it is none of patchsweep's
    message: str
    n_forwards: int  # modules of any model that ran
    changed: tuple[str, ...]  # files that are there now and were not, or are not as they were


def read_cases() -> list[Bad]:
    """The bad inputs, in order."""
    found: list[Bad] = []
    group = ""
    for line in DATA.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif line and not line.startswith("# "):
            call, _, told = line.partition(" -> ")
            error, _, words = told.partition(": ")
            found.append(Bad(group, call, error, tuple(words.split(" | "))))
    return found


class World:
    """A model, prompts, stores and files, in a folder that the calls are made in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        m, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
        (pair,) = pairs
        good = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong_answer": " John"}
        for name, text in (
            ("pairs.jsonl", json.dumps(good)),
            ("broken.jsonl", "{"),
            ("empty.jsonl", ""),
            ("unknown_key.jsonl", json.dumps({**good, "lable": {}})),
            ("folder/notes.txt", "notes"),
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{text}\n")
        ds = sweep(m, pairs, "z", layers=[1], store=folder / "a.zarr")
        sweep(m, pairs, "z", layers=[1], method=["exact", "atp"], store=folder / "b.zarr")
        words = [f"{key}={value}" for key, value in (("model", "tiny"), ("task", "pairs.jsonl"))]
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            assert main(["lens", *words, "store=lens.zarr", "sublayers=false"]) == 0
        _, cache = m.run_with_cache(torch.tensor([pair.clean]))
        eight = {
            name: getattr(pair, name) * 8
            for name in ("clean", "corrupted", "clean_tokens", "corrupted_tokens")
        }
        self.names = {
            **{one.__name__: one for one in FACE},
            "np": np,
            "torch": torch,
            "xr": xr,
            "patching": patching,
            "summary": summary,
            "CLEAN": CLEAN,
            "CORRUPTED": CORRUPTED,
            "m": m,
            "P": pairs,
            "ds": ds,
            "long": PromptPairs((replace(pair, **eight),)),
            "foreign": PromptPairs((replace(pair, clean=(40_000, *pair.clean[1:])),)),
            "uneven": PromptPairs((replace(pair, corrupted=pair.corrupted[:-1]),)),
            "unequal": PromptPairs(
                (
                    replace(
                        pair,
                        corrupted=pair.corrupted[:-1],
                        corrupted_tokens=pair.corrupted_tokens[:-1],
                    ),
                )
            ),
            "unanswered": PromptPairs((replace(pair, answer=()),)),
            "tokens": torch.tensor([pair.corrupted]),
            "cache": cache,
            "metric": lambda logits: logits[0, -1, 5],
            "D": _dictionary,
        }

    def answer(self, bad: Bad) -> Answer:
        """What `bad` is answered."""
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        before = self._files()
        with (
            contextlib.chdir(self.folder),
            torch.nn.modules.module.register_module_forward_pre_hook(count),
        ):
            error, message = self._command(bad) if bad.error == COMMAND else self._call(bad)
        changed = sorted(dict(before ^ self._files()))
        message = message.replace(str(self.folder), "...").strip()
        return Answer(error, message, forwards, tuple(changed))

    def _call(self, bad: Bad) -> tuple[str, str]:
        try:
            found = eval(bad.call, dict(self.names))
        except PatchsweepError as error:
            return type(error).__name__, str(error)
        except Exception as error:
            return f"{type(error).__module__}.{type(error).__name__}", str(error)
        return f"taken: {type(found).__name__}", ""

    def _command(self, bad: Bad) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch.object(run_config, "load_model", _kept(run_config.load_model)),
            patch.object(run_config, "meta_model", _kept(run_config.meta_model)),
            # which composes every config once more, to see whether a file asks for many runs
            patch.object(Hydra, "get_mode", lambda *_, **__: None),
        ):
            try:
                code: object = main(shlex.split(bad.call))
            except BaseException as error:  # argparse's SystemExit among them
                code = repr(error)
        return f"exit {code}", err.getvalue().removeprefix("patchsweep: ")

    def _files(self) -> set[tuple[str, tuple[int, int]]]:
        found = set()
        for path in self.folder.rglob("*"):
            about = path.stat()
            found.add((str(path.relative_to(self.folder)), (about.st_size, about.st_mtime_ns)))
        return found


def _dictionary(width: int, layer: int, **given: Any) -> Dictionary:
    """A dictionary of four latents, zero throughout."""
    shapes = ((width, 4), (4, width), (4,), (width,))
    settings = {"site": "resid_post", "layer": layer, **given}
    return Dictionary(*(torch.zeros(shape) for shape in shapes), **settings)


def _kept(load: Any) -> Any:
    """`load`, which does not load the usual tiny model again."""

    def call(name: str, **options: Any) -> Any:
        usual = {"dtype": "float32", "trust_remote_code": False}
        plain = {
            key: value for key, value in options.items() if value not in (None, usual.get(key))
        }
        return model(name) if name == "tiny:llama" and not plain else load(name, **options)

    return call


def page(answers: Iterator[tuple[Bad, Answer]]) -> str:
    """The page with a row for each bad input."""
    lines, group = [HEAD.rstrip()], ""
    for bad, answer in answers:
        if bad.group != group:
            group = bad.group
            lines += ["", f"## {group}", "", "| input | error | what is said |", "|---|---|---|"]
        lines.append(row(bad, answer))

    return "\n".join(lines) + "\n"


def row(bad: Bad, answer: Answer) -> str:
    """The row of one bad input."""
    call, message = (
        text.replace("|", r"\|").replace("\n", " ") for text in (bad.call, answer.message)
    )
    return f"| `{call}` | {answer.error} | {message} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder).resolve())
        os.environ.pop("PATCHSWEEP_DEBUG", None)
        PAGE.write_text(page((bad, world.answer(bad)) for bad in read_cases()), encoding="utf-8")
    print(PAGE)
