"""Words of the command line: short forms, texts taken literally, keys that are not there."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.circuit import CircuitRun
from patchsweep.cli.early import conf_folder
from patchsweep.cli.grammar import expand
from patchsweep.cli.lens import LensRun
from patchsweep.cli.mistakes import one_line
from patchsweep.cli.schema.run import FileTask, RunConfig, TextTask
from patchsweep.errors import ConfigError

ROOT = Path(__file__).parents[1]
NAMES = [
    "pairs (1)", "lr=0.1", "daten_größe", "[v2]", "a&b", "#1", "{x}", "it's", "~x", "a,b",
    'say "hi"', "a b", "100%", "x@y", "back\\slash", "end\\", "a:b", "$HOME", "+x", "null", "true",
    "1e3", "a;b", "{a",
]  # fmt: skip
PROMPTS = {"clean": "a", "corrupted": "b", "answer": " c", "wrong_answer": " d"}


def composed(*words: str, verb: str = "run", schema: type[RunConfig] = RunConfig) -> Any:
    """The config of these words."""
    found: list[Any] = []
    compose(verb, list(words), lambda cfg: found.append(as_config(cfg)), schema)
    return found[0]


def refused(*words: str, verb: str = "run", schema: type[RunConfig] = RunConfig) -> str:
    """The line that tells of the mistake in these words."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # Hydra's own among them
        composed(*words, verb=verb, schema=schema)
    text = one_line(caught.value)
    assert text is not None, caught.value
    assert "\n" not in text
    assert "+" not in text, "adding a key is no remedy"
    assert "hydra.cc" not in text
    return text


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["store=runs/a.zarr"], ["store.path='runs/a.zarr'"]),
        (["store=local"], ["store=local"]),
        (["sites=q"], ["sites.names=[q]"]),
        (["intervention=scale(0.5)"], ["intervention='scale(0.5)'"]),
        (["intervention={a:zero,b:scale(2)}"], ["intervention={a:zero,b:'scale(2)'}"]),
        (["intervention={a:'scale(2)'}"], ["intervention={a:'scale(2)'}"]),
        (["sites=[q,k]"], ["sites.names=[q,k]"]),
        (["sites=heads"], ["sites=heads"]),
        (["sites=heads,residual"], ["sites=heads,residual"]),
        (["metric=[prob,rank]"], ["metric.names=[prob,rank]"]),
        # between brackets, a name that a file of the group has too is a name
        (["metric=[prob,kl,rank]"], ["metric.names=[prob,kl,rank]"]),
        (["model=tiny:gpt2"], ["model=tiny", "model.name='tiny:gpt2'"]),
        (["model=smollm2-135m"], ["model=smollm2", "model.name='smollm2-135m'"]),
        (["model=./folder"], ["model=hf", "model.name='./folder'"]),
        (["task=a/pairs.jsonl"], ["task=jsonl", "task.path='a/pairs.jsonl'"]),
        (["task=nothing"], ["task=nothing"]),
        (["slice=0", "-m", "n_slices=2"], ["-m", "slice=0", "n_slices=2"]),
        (["slice=range(0,3)", "-m"], ["-m", "slice=range(0,3)"]),
        (["model=tiny", "--cfg", "job"], ["--cfg", "job", "model=tiny"]),
        (["-m", "task=a.jsonl,b c.jsonl"], ["-m", "task=jsonl", "task.path='a.jsonl','b c.jsonl'"]),
        (["-m", "store=glob(a*)"], ["-m", "store.path=glob(a*)"]),
        (["-m", "task.clean=a, b"], ["-m", "task.clean='a, b'"]),
        (["-m", "task.clean='a','b'"], ["-m", "task.clean='a','b'"]),
        (["+sites.layers=[0]"], ["sites.layers=[0]"]),
        (["task.options.order=abba"], ["++task.options.order=abba"]),
        (["hydra.sweep.dir=a"], ["hydra.sweep.dir=a"]),
        (["model.revision=null"], ["model.revision=null"]),
    ],
    ids=" ".join,
)
def test_short_forms_mean_their_long_forms(short: list[str], long: list[str]) -> None:
    assert expand(short) == long


@pytest.mark.parametrize("name", NAMES)
def test_paths_and_prompts_are_taken_as_they_are_written(name: str) -> None:
    path = f"{name}.jsonl"
    config = composed(f"task={path}", f"store={name}.zarr", f"model=./{name}")
    assert config.task == FileTask(path)
    assert config.store.path == f"{name}.zarr"
    assert config.model.name == f"./{name}"
    texts = {key: f"{text} {name}" for key, text in PROMPTS.items()}
    words = (f"task.{key}={text}" for key, text in texts.items())
    config = composed("task=strings", *words, f"model.name={name}")
    assert config.task == TextTask(**texts)
    assert config.model.name == name


@given(st.text("ab'\"\\${}[](),=~ \n\té_:.", max_size=12))
@settings(max_examples=300, deadline=None)
def test_prompt_comes_out_of_the_grammar_as_it_went_in(text: str) -> None:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return  # quotes of the grammar's own, see below
    (word,) = expand([f"task.clean={text}"])
    value = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.create({"clean": value}).clean == text


@pytest.mark.parametrize("text", ["echo ${HOME} prints", "\\${a", "${", "${oc.env:HOME}", "a\nb"])
def test_prompt_is_not_interpolated(text: str) -> None:
    words = [f"task.{key}={value}" for key, value in {**PROMPTS, "clean": text}.items()]
    assert composed("task=strings", *words).task.clean == text


def test_quotes_around_a_whole_value_are_taken_off() -> None:
    words = ["task=strings", *(f'task.{key}="{text}"' for key, text in PROMPTS.items())]
    assert composed(*words).task == TextTask(**PROMPTS)
    assert composed("store='a b.zarr'").store.path == "a b.zarr"
    said = '''"\\"Come in\\", he said"'''
    assert composed(*words, f"task.clean={said}").task.clean == '"Come in", he said'


def test_escapes_in_a_prompt_are_two_characters_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"task.{key}={text}" for key, text in {**PROMPTS, "clean": "a\\nb"}.items()]
    assert composed("task=strings", *words).task.clean == "a\\nb"
    assert "task.clean holds \\n as two characters" in capsys.readouterr().err


def test_store_path_may_hold_keys() -> None:
    path = "store=runs/${hydra:runtime.choices.task}-${intervention}.zarr"
    assert composed("task=facts", path).store.path == "runs/facts-resample.zarr"
    text = refused("store=runs/${HOME}.zarr")
    assert "HOME" in text
    assert "such as ${model.name}" in text


UNKNOWN = {
    "group": (["tsk=ioi"], "'tsk' is not known; did you mean task?"),
    "key": (["sties.layers=[0]"], "did you mean sites.layers?"),
    "added-key": (["+sties.layers=[0]"], "did you mean sites.layers?"),
    "forced-key": (["++model.nam=x"], "did you mean model.name"),
    "key-of-a-group": (["layers=[0]"], "did you mean sites.layers?"),
    "below-a-leaf": (["slice.x=1"], "'slice.x' is not known"),
    "of-another-choice": (["task=ioi", "task.clean=x"], "clean belongs to task=strings"),
    "of-another-method": (["method=atp", "method.k=3"], "k belongs to method=screen"),
    "no-pair": (["model=tiny", "foo"], "'foo' is no key=value"),
    "flag": (["--bogus"], "--bogus"),
    "flag-without-value": (["--cfg"], "expected one argument"),
    "brackets": (["sites.layers=[0"], "brackets and quotes must come in pairs"),
    "hydra": (["hydra.swep.dir=x"], "'hydra.swep.dir' is not known"),
    "empty": (["store="], "store= is empty"),
    "empty-task": (["task="], "task= is empty"),
}


@pytest.mark.parametrize(("words", "part"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_unknown_key_is_refused_with_what_is_near(words: list[str], part: str) -> None:
    assert part in refused(*words)


def test_keys_of_a_verb_are_its_own() -> None:
    found = composed("patch.site=z", "patch.layer=1", verb="lens", schema=LensRun)
    assert found.patch.site == "z"
    assert "'top' is not known" in refused("top=3")
    text = refused("patch.sight=z", verb="lens", schema=LensRun)
    assert "did you mean patch.site" in text
    assert "lens --help" in text
    assert "'patch.site' is not known" in refused("patch.site=z", verb="circuit", schema=CircuitRun)


def test_answers_of_several_tokens_are_allowed_by_a_key() -> None:
    words = [f"task.{key}={text}" for key, text in PROMPTS.items()]
    assert not composed("task=strings", *words).task.multi_token
    assert composed("task=strings", *words, "task.multi_token=true").task.multi_token
    assert composed("task=a.jsonl", "task.multi_token=true").task == FileTask("a.jsonl", True)


def test_config_groups_are_found_without_a_symbolic_link() -> None:
    assert conf_folder() == ROOT / "conf"
    for folder in ("conf", "engine", "kernels"):
        assert not [path for path in (ROOT / folder).rglob("*") if path.is_symlink()]


def test_missing_config_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "engine" / "patchsweep" / "cli" / "early.py"
    monkeypatch.setattr("patchsweep.cli.early.__file__", str(module))
    with pytest.raises(ConfigError, match="install patchsweep from a wheel"):
        conf_folder()


def test_command_line_runs_under_an_argparse_that_reads_help_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = argparse.ArgumentParser.add_argument

    def strict(self: argparse.ArgumentParser, *names: Any, **options: Any) -> Any:
        action = add(self, *names, **options)
        assert action.help is None or "%" not in action.help or action.help % vars(action)
        return action  # as Python 3.14 reads it

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", strict)
    assert composed("model=tiny").model.name == "tiny:llama"
    assert argparse.ArgumentParser.add_argument is strict, "put back as it was"
    assert "HYDRA_FULL_ERROR" in os.environ
