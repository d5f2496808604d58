"""Mistakes in a command that are told before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
from patchsweep.cli import early
from patchsweep.cli.keys import keys_of
from patchsweep.cli.main import VERBS

CONFIGURED = (
    "run",
    "plan",
    "edges",
    "circuit",
    "acdc",
    "lens",
    "trace",
    "attention",
    "heads",
    "multiverse",
    "latents",
)


@pytest.mark.parametrize("verb", CONFIGURED)
def test_keys_read_from_the_source_are_those_of_the_dataclasses(verb: str) -> None:
    read = early._keys_of(verb)
    assert read is not None
    module, name = f"patchsweep.cli.{verb}", f"{verb.capitalize()}Run"
    if verb == "run":
        module, name = "patchsweep.cli.schema.run", "RunConfig"
    schema = getattr(import_module(module), name)

    def compare(a: early.Keys, b: early.Keys) -> None:
        if a is not early.ANY:  # what lies below is left to Hydra
            assert set(a) == set(b)
            for name in a:
                compare(a[name], b[name])

    compare(read, keys_of(schema))


def test_verbs_without_a_config_are_let_pass() -> None:
    for verb in set(VERBS) - set(CONFIGURED):
        early.refuse(verb, ["store.zarr", "nosuch=1", "--x"])


def test_a_mistake_needs_neither_torch_nor_xarray() -> None:
    commands = {
        "run sitez=z": "did you mean sites",
        "edges task.n_pair=3": "did you mean task.n_pairs",
        "run task=iio": "task=iio is not known; use one of",
        "lens patch.sit=z": "key 'patch.sit' is not known",
        "run sites=resid": "site 'resid' is not known",
        "plan runner=fast": "runner=fast is not known; use one of auto, hooked, packed",
        "rnu task=ioi": "did you mean run",
    }
    code = (
        "import contextlib, io, json, sys\n"
        "from patchsweep.cli.main import main\n"
        "said = []\n"
        f"for command in {list(commands)!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
        "        assert main(command.split()) == 2\n"
        "    said.append(told.getvalue())\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'xarray', 'zarr', 'hydra'}\n"
        "print(json.dumps([said, sorted(heavy & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, heavy = json.loads(done.stdout)
    for text, expected in zip(said, commands.values(), strict=True):
        assert expected in text
        assert text.count("\n") == 1
    assert heavy == []
