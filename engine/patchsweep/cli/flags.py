"""The flags that Hydra reads, such as -m and --cfg, and the words that are no overrides."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser

from patchsweep.errors import ConfigError


def check_flags(verb: str, words: Sequence[str]) -> None:
    """Raise for flags that Hydra does not know, and for words that are not overrides.

    Hydra itself would print its long usage text and exit.

    Raises:
        ConfigError: a flag is not known, or a word is no `key=value`.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `patchsweep {verb} --help` lists flags and keys")

    with texts_as_help():
        parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    for word in parser.parse_args(words).overrides:
        if "=" not in word and not word.startswith("~"):
            refuse(f"{word!r} is no key=value")


@contextmanager
def texts_as_help() -> Iterator[None]:
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
