"""The options of the verbs that take a store: a mistake is told in one line, as everywhere."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from patchsweep.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Argparse whose mistakes are errors of the user's, not a usage of many lines."""

    def parse_args(self, words: list[str]) -> argparse.Namespace:  # type: ignore[override]
        """The options of `words`.

        Raises:
            ConfigError: there is no such option, or one is missing or wrong.
        """
        self._words = words
        return super().parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving."""
        remedy = f"`{self.prog} --help` says more"
        dashed = [word for word in getattr(self, "_words", ()) if word[:1] == "-"]
        if dashed and ("required" in message or "unrecognized" in message):
            remedy = f"a path that begins with a dash is written ./{dashed[0]}; {remedy}"
        raise ConfigError(f"{message}; {remedy}")


def at_least(least: int, option: str) -> Any:
    """The type of an option that is a whole number of at least `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ConfigError(f"{option} is {text!r}; use a whole number from {least} on")
        return value

    return number
