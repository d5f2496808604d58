"""Composes a `RunConfig` from the words of a command line with Hydra."""

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

from patchsweep.cli.early import conf_folder
from patchsweep.cli.grammar import expand, is_many
from patchsweep.cli.schema.run import RunConfig, register
from patchsweep.errors import ConfigError


def compose(
    verb: str,
    arguments: list[str],
    job: Callable[[DictConfig], None],
    schema: type[RunConfig] = RunConfig,
) -> None:
    """Let Hydra call `job` with the config of `arguments`, once or (with -m) several times.

    The config is `schema` with the values of `conf/<verb>.yaml`; for a plain `RunConfig`, those of
    `conf/config.yaml`. Errors, including Hydra's, are raised unchanged; `mistakes` words them.

    Raises:
        ConfigError: a flag or a key is not known.
    """
    register()
    # `conf/config.yaml` has it as a default, and `conf/<verb>.yaml` has `conf/config.yaml`
    ConfigStore.instance().store(name="run_schema", node=schema)
    name = "config" if schema is RunConfig else verb
    failed: list[Exception] = []

    def once(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except Exception as error:  # hidden from Hydra, which would print its own message
            failed.append(error)

    words = expand(arguments, verb, schema)
    # makes Hydra raise its errors instead of printing them with a traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, [f"patchsweep {verb}", *words]
    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)
    try:
        with _texts_as_help():
            _check_flags(verb, words)
            main(job if is_many(arguments) else once)()  # launchers pickle `job`, not a closure
    finally:
        sys.argv = before
    if failed:
        raise failed[0]


def as_config(cfg: DictConfig) -> RunConfig:
    """Return the dataclasses of `cfg`; the only conversion from OmegaConf."""
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, RunConfig)
    return config


def _check_flags(verb: str, words: list[str]) -> None:
    """Raise for flags that Hydra does not know, and for words that are not overrides.

    Hydra itself would print its long usage text and exit.
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
    """Replace option helps that are not strings, such as one of Hydra 1.3, inside this context.

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
