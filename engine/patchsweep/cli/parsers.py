"""The options of the verbs that Hydra does not configure: parsed before torch is imported."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from patchsweep.errors import ConfigError

N_CELLS = 24  # values that `verify` and `demo` run again
_MADE = (
    "what made the store, as for `patchsweep run`: model=... task=..., and metric=... of your own"
)


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

    def parse_intermixed_args(self, words: list[str]) -> Namespace:  # type: ignore[override]
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


def status(words: list[str]) -> Namespace:
    """Return the options of `status`."""
    parser = Parser(
        "patchsweep status",
        description="How far the run of a store has come: units done, running, stale and missing, "
        "and which of its files are lost or have another length than they had. "
        "`patchsweep verify` reads every byte.",
        epilog="Exit codes: 0 complete; 2 there is no such store; 3 not complete, or damaged.",
    )
    parser.add_argument("store", help="folder or URL")
    return parser.parse_args(words)


def verify(words: list[str]) -> Namespace:
    """Return the options of `verify`.

    Raises:
        ConfigError: a number of values without the model and the task that they need.
    """
    parser = Parser(
        "patchsweep verify",
        description="Check a store: every file is read and held against its digest. With the "
        "model and the task, a random sample of a sweep's values is run again too, one forward "
        "pass through the model's hooks each.",
        epilog="Exit codes: 0 sound and complete; 2 there is no such store, or its model or task "
        "cannot be loaded; 3 sound so far, not complete; 4 files are damaged or values differ.",
    )
    parser.add_argument("store", help="folder or URL")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=_MADE)
    parser.add_argument(
        "-n", type=at_least(0), metavar="N", help=f"values to run again ({N_CELLS})"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=None, help="of the sample (another each time)"
    )
    options = parser.parse_intermixed_args(words)
    if options.n and not options.words:
        raise ConfigError(
            f"-n {options.n} runs values again; name what made them: model=... task=..."
        )
    return options


def compare(words: list[str]) -> Namespace:
    """Return the options of `compare`.

    Raises:
        ConfigError: a model or a task without the sample that runs on it.
    """
    parser = Parser(
        "patchsweep compare",
        description="Attribution's estimates beside the exact effects of one store: correlations, "
        "the largest misses by name, and which sites they may be trusted on.",
    )
    parser.add_argument("store", help="folder or URL, of a run with estimates")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=f"with --sample: {_MADE}")
    parser.add_argument(
        "--sample",
        type=at_least(1),
        metavar="N",
        help="run N random patches of each site exactly, where the store holds estimates alone",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of that sample (0)")
    parser.add_argument("--json", action="store_true", help="all numbers, for scripts")
    options = parser.parse_intermixed_args(words)
    if options.words and not options.sample:
        raise ConfigError(f"{options.words[0]} is for --sample N, which runs patches; leave it out")
    return options


def report(words: list[str]) -> Namespace:
    """Return the options of `report`."""
    parser = Parser(
        "patchsweep report",
        description="Write a store as one self-contained HTML page, which opens offline.",
    )
    parser.add_argument("store", help="folder or URL")
    parser.add_argument("-o", "--out", default="report.html", help="file (report.html)")
    return parser.parse_args(words)


def explore(words: list[str]) -> Namespace:
    """Return the options of `explore`."""
    parser = Parser(
        "patchsweep explore",
        description="One page in the browser, served on this machine alone: type two prompts and "
        "their answers, choose sites, and see the maps fill in; click a cell for its lens, its "
        "attention and its edges. Ctrl-C ends it.",
    )
    parser.add_argument("--model", default="smollm2-135m", help="as load_model takes it")
    parser.add_argument("--port", type=at_least(0), default=0, help="of this machine (a free one)")
    return parser.parse_args(words)


def task(words: list[str]) -> Namespace:
    """Return the options of `task`; its field `verb` is list or check."""
    parser = Parser("patchsweep task", description="The built-in tasks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="names, what they ask, and their sources")
    check = verbs.add_parser(
        "check", help="how well a model does a task: a sweep of a task it fails explains nothing"
    )
    check.add_argument("names", nargs="*", metavar="NAME", help="tasks (all), or files of pairs")
    check.add_argument("--template", choices=["chat"], help="of the files' prompts")
    check.add_argument("--align", choices=["end"], help="prompts may have unequal lengths")
    check.add_argument("--model", default="smollm2-135m", help="as load_model takes it")
    check.add_argument("--n-pairs", type=at_least(1), help="pairs (the task's own number)")
    check.add_argument("--seed", type=at_least(0), default=0, help="of the pairs (0)")
    return parser.parse_args(words)


def demo(words: list[str]) -> Namespace:
    """Return the options of `demo`."""
    parser = Parser(
        "patchsweep demo",
        description="Sweep one indirect-object pair over resid_pre, attn_out, mlp_out and every "
        f"head at every position, check {N_CELLS} random cells against a TransformerLens loop, "
        "and write a report.",
    )
    parser.add_argument("--model", default="smollm2-135m", help="as load_model takes it")
    parser.add_argument("--out", default="runs/demo", help="folder for the store and the report")
    parser.add_argument(
        "--seed", type=at_least(0), default=None, help="of the cells that are checked"
    )
    return parser.parse_args(words)


# verb -> what parses its words; it raises ConfigError, or prints the help and exits
PARSERS: dict[str, Callable[[list[str]], Namespace]] = {
    parse.__name__: parse for parse in (status, verify, compare, report, explore, task, demo)
}


def check(verb: str, words: Sequence[str]) -> None:
    """Raise for a mistake in the options of a verb; verbs that Hydra configures are let pass.

    Raises:
        ConfigError: an option is unknown, missing or wrong.
    """
    if verb in PARSERS:
        PARSERS[verb](list(words))
