"""Mistakes in a command that are told before anything heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, get_type_hints

import pytest
import yaml
from patchsweep.cli import early
from patchsweep.cli.main import VERBS, main
from patchsweep.cli.parsers import PARSERS
from patchsweep.cli.schema.run import GROUPS, RunConfig
from patchsweep.errors import ConfigError

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
FREE = ("task.options.relation", "task.options.order", "task.options.corruption")  # a mapping's


def schema_of(verb: str) -> type[RunConfig]:
    if verb == "run":
        return RunConfig
    schema: type[RunConfig] = getattr(
        import_module(f"patchsweep.cli.{verb}"), f"{verb.capitalize()}Run"
    )
    return schema


def of_class(one: type) -> early.Keys:
    """The keys of a dataclass: free below a mapping, and those of the dataclasses in it."""
    hints = get_type_hints(one)
    kinds = {field.name: hints[field.name] for field in fields(one)}
    return {
        name: of_class(kind)
        if is_dataclass(kind)
        else early.ANY
        if kind is Any or str(kind).startswith("dict")
        else {}
        for name, kind in kinds.items()
    }


def keys_of(schema: type[RunConfig]) -> early.Keys:
    keys = dict(of_class(schema))
    for group, classes in GROUPS.items():
        keys[group] = {name: below for one in classes for name, below in of_class(one).items()}
    return keys


@pytest.mark.parametrize("verb", CONFIGURED)
def test_keys_read_from_the_source_are_those_of_the_dataclasses(verb: str) -> None:
    read = early.keys_of(verb)
    assert read is not None

    def compare(a: early.Keys, b: early.Keys) -> None:
        assert (a is early.ANY) == (b is early.ANY)
        assert set(a) == set(b)
        for name in a:
            compare(a[name], b[name])

    compare(read, keys_of(schema_of(verb)))


@pytest.mark.parametrize("verb", CONFIGURED)
def test_help_lists_the_keys_that_the_verb_takes_and_no_others(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    after = capsys.readouterr().out.partition("As they stand:\n")[2]
    config = yaml.safe_load(after.partition("Exit codes")[0])
    listed = dict(leaves(config))

    accepted = []
    for key in early.flat(keys_of(schema_of(verb))):
        try:
            early.refuse(verb, [f"{key}="])
        except ConfigError:
            continue
        accepted.append(key)
    of_other_choices = {key for key in accepted if key.partition(".")[0] in GROUPS}
    assert set(listed) <= {*accepted, *FREE}, "a listed key is refused"
    assert {*accepted} - {*listed} <= of_other_choices, "an accepted key is not listed"
    for group in GROUPS:
        below = [key for key in accepted if key.startswith(f"{group}.")]
        assert bool(below) == (group in config), group


def leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of the config, those of a mapping as `group.key`."""
    for name, value in config.items():
        yield f"{before}{name}", value
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{name}.")


def test_verbs_without_a_config_know_their_options() -> None:
    told = {
        "report": (["a.zarr", "--outt", "x"], "unrecognized arguments: --outt"),
        "compare": (["a.zarr", "model=tiny"], "is for --sample N"),
        "status": ([], "required: store"),
        "verify": (["a.zarr", "-n", "x"], "'x' is no whole number"),
        "explore": (["--prot", "1"], "unrecognized arguments: --prot"),
        "task": (["chek"], "invalid choice"),
        "demo": (["--bad"], "unrecognized arguments: --bad"),
    }
    assert set(told) == set(VERBS) - set(CONFIGURED) == set(PARSERS)
    for verb, (words, part) in told.items():
        with pytest.raises(ConfigError, match=re.escape(part)):
            early.refuse(verb, words)


def test_a_mistake_needs_neither_torch_nor_xarray() -> None:
    commands = {
        "run sitez=z": "did you mean sites",
        "edges task.n_pair=3": "did you mean task.n_pairs",
        "run task=iio": "task=iio is not known; use one of",
        "lens patch.sit=z": "key 'patch.sit' is not known",
        "run sites=resid": "site 'resid' is not known",
        "plan runner=fast": "runner=fast is not known; use one of auto, hooked, packed",
        "rnu task=ioi": "did you mean run",
        "run --bad": "unrecognized arguments: --bad",
        "plan x": "'x' is no key=value",
        "edges sites=z": "edges have no sites",
        "heads sites.layers=[1]": "a study is of all heads",
        "circuit intervention=mean": "circuits call it ablation",
        "report --bad a.zarr": "unrecognized arguments: --bad",
        "compare a.zarr --sample 0": "'0' is no whole number from 1 on",
        "verify a.zarr -n 3": "name what made them",
        "status": "required: store",
        "task chek": "invalid choice",
        "demo --bad": "unrecognized arguments: --bad",
        "explore --bad": "unrecognized arguments: --bad",
    }
    code = (
        "import contextlib, io, json, sys\n"
        "from patchsweep.cli.main import main\n"
        "said = []\n"
        f"for command in {list(commands)!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
        "        assert main(command.split()) == 2\n"
        "    said.append(told.getvalue())\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'xarray', 'zarr', 'numpy'}\n"
        "print(json.dumps([said, sorted(heavy & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, heavy = json.loads(done.stdout)
    for text, expected in zip(said, commands.values(), strict=True):
        assert expected in text
        assert text.count("\n") == 1
    assert heavy == []
