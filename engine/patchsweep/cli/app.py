"""The way from words on the command line, through Hydra, to a `RunConfig`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from patchsweep.cli.grammar import conf_folder, expand, is_many
from patchsweep.cli.schema.run import RunConfig, register
from patchsweep.errors import ConfigError


def compose(
    verb: str,
    arguments: list[str],
    job: Callable[[DictConfig], None],
    schema: type[RunConfig] = RunConfig,
) -> None:
    """Let Hydra call `job` with the config of `arguments`, once or (with -m) many times.

    The config is `schema` with the values of `conf/<verb>.yaml`; of a plain `RunConfig`, those of
    `conf/config.yaml`. Errors come out as they are, Hydra's own among them, to be told in one line.

    Raises:
        ConfigError: a flag or a key is not known.
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

    words = expand(arguments, verb, schema)
    # Hydra then raises its errors instead of printing them with a stack of its own
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, [f"patchsweep {verb}", *words]
    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)
    try:
        with _texts_as_help():
            _check_flags(verb, words)
            main(job if is_many(arguments) else once)()  # as it is, since launchers pickle it
    finally:
        sys.argv = before
    if failed:
        raise failed[0]


def as_config(cfg: DictConfig) -> RunConfig:
    """The dataclasses; the only place where OmegaConf is left behind."""
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, RunConfig)
    return config


def _check_flags(verb: str, words: list[str]) -> None:
    """Raise for flags that Hydra does not know, and for words that are no overrides.

    Hydra itself would print its usage, of many lines, and leave.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `patchsweep {verb} --help` lists flags and keys")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    for word in parser.parse_args(words).overrides:
        if "=" not in word and not word.startswith("~"):
            refuse(f"{word!r} is no key=value")


@contextmanager
def _texts_as_help() -> Iterator[None]:
    """Inside, options of a command line may have a help that is no text, as one of Hydra 1.3 has.

    The argparse of Python 3.14 reads each help when its option is added, and fails at that one.
    """
    add = argparse.ArgumentParser.add_argument

    def add_argument(self: argparse.ArgumentParser, *names: Any, **options: Any) -> Any:
        if not isinstance(options.get("help", ""), str):
            options["help"] = "Install or uninstall shell completion"
        return add(self, *names, **options)

    argparse.ArgumentParser.add_argument = add_argument  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.add_argument = add  # type: ignore[method-assign]
