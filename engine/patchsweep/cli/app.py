"""The way from words on the command line, through Hydra, to a `RunConfig`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import resources

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from patchsweep.config import RunConfig, register
from patchsweep.models.embedded import EMBEDDED

# group -> the key that a value goes to which is none of the group's choices
_MAIN_KEYS = {
    "model": "model.name",
    "task": "task.path",
    "sites": "sites.names",
    "method": "method.names",
    "metric": "metric.names",
    "store": "store.path",
}


def compose(
    verb: str,
    arguments: list[str],
    job: Callable[[DictConfig], None],
    schema: type[RunConfig] = RunConfig,
) -> None:
    """Let Hydra call `job` with the config of `arguments`, once or (with -m) many times.

    The config is `schema` with the values of `conf/<verb>.yaml`; of a plain `RunConfig`, those of
    `conf/config.yaml`. Errors come out as they are, Hydra's own among them, to be told in one line.
    """
    register()
    # `conf/config.yaml` begins with it, and `conf/<verb>.yaml` with `conf/config.yaml`
    ConfigStore.instance().store(name="run_schema", node=schema)
    name = "config" if schema is RunConfig else verb
    failed: list[Exception] = []

    def once(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except Exception as error:  # kept from Hydra, which would print words of its own
            failed.append(error)

    many = not {"-m", "--multirun"}.isdisjoint(arguments)
    # Hydra then raises its errors instead of printing them with a stack of its own
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, [f"patchsweep {verb}", *expand(arguments)]
    main = hydra.main(version_base="1.3", config_path="pkg://patchsweep.conf", config_name=name)
    try:
        main(job if many else once)()  # `job` as it is, since launchers pickle it
    finally:
        sys.argv = before
    if failed:
        raise failed[0]


def as_config(cfg: DictConfig) -> RunConfig:
    """The dataclasses; the only place where OmegaConf is left behind."""
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, RunConfig)
    return config


def expand(arguments: list[str]) -> list[str]:
    """Flags, then overrides in which short forms such as `sites=[q,k]` are spelled out.

    Flags first, wherever they were: argparse takes no overrides on both sides of a flag.
    """
    overrides = [word for word in arguments if _is_override(word)]
    words = [word for word in arguments if not _is_override(word)]
    for argument in overrides:
        group, equals, value = argument.partition("=")
        if not equals or group not in _MAIN_KEYS or _is_choice(group, value):
            words.append(argument)
            continue
        if group == "task" and not value.endswith(".jsonl"):
            words.append(argument)  # Hydra says what the choices are
            continue
        if group == "model":
            words.append(f"model={_kind(value)}")
        if group == "task":
            words.append("task=jsonl")
        if group in ("sites", "method", "metric") and not value.startswith("["):
            value = f"[{value}]"
        words.append(f"{_MAIN_KEYS[group]}={value}")
    return words


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _kind(model: str) -> str:
    """The choice of the group model that a model's name belongs to."""
    return "tiny" if model.startswith("tiny:") else "smollm2" if model in EMBEDDED else "hf"


def _is_choice(group: str, value: str) -> bool:
    """Whether Hydra finds a file for the value, or for one of several values of a sweep."""
    choices = {
        file.name.removesuffix(".yaml")
        for file in resources.files("patchsweep.conf").joinpath(group).iterdir()
    }
    return not value or any(word in choices for word in value.split(","))
