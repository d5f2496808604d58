"""The argument parser of the verbs that take a store; mistakes raise one-line errors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from patchsweep.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of printing its usage and exiting."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse; all its other parse methods call this one.

        Raises:
            ConfigError: an option is unknown, missing or wrong.
        """
        self._words = args or self._words
        return super().parse_known_args(args, namespace)

    def parse_intermixed_args(self, words: list[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse positional words and options in any order."""
        self._words = words
        return super().parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of exiting."""
        remedy = f"`{self.prog} --help` says more"
        dashed = [word for word in self._words if re.match("-[^-]", word)]
        if dashed and ("required" in message or "unrecognized" in message):
            remedy = f"a path that begins with a dash is written ./{dashed[0]}; {remedy}"
        raise ConfigError(f"{message}; {remedy}")


def at_least(least: int) -> Callable[[str], int]:
    """Return the argparse type of an option that is a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return number
