"""Composes a `RunConfig` from the words of a command line with Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from string import Template
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from patchsweep.cli.early import conf_folder, refused
from patchsweep.cli.flags import check_flags, texts_as_help
from patchsweep.cli.grammar import expand, is_many
from patchsweep.cli.schema.run import RunConfig, register


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

    words = expand(arguments, verb)
    check_flags(verb, words)
    if not {"-h", "--help"}.isdisjoint(words):
        print(help_of(verb, words, schema))
        raise SystemExit(0)
    # makes Hydra raise its errors instead of printing them with a traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, [f"patchsweep {verb}", *words]
    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)
    try:
        with texts_as_help():
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


def help_of(verb: str, words: Sequence[str], schema: type[RunConfig] = RunConfig) -> str:
    """Return the help of `verb`: its text, and the keys that it takes with their values.

    Keys that the verb refuses are left out.
    """
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        name = "config" if schema is RunConfig else verb
        cfg = hydra.compose(name, overrides, return_hydra_config=True)
    template = cfg.hydra.help.template
    config = cast(dict[str, Any], OmegaConf.to_container(cfg))
    del config["hydra"]
    for key in refused(verb):
        *groups, last = key.split(".")
        within = config
        for group in groups:
            within = within.get(group, {})
        within.pop(last, None)
    return Template(template).substitute(CONFIG=OmegaConf.to_yaml(OmegaConf.create(config)))
