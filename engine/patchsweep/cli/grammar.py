"""Turns the words of a command line into Hydra overrides: expands short forms, quotes texts.

Hydra parses values with its own grammar, in which brackets, quotes, `~`, `=`, commas and
backslashes are special. Paths and prompts are plain text, so this module quotes them.
"""

from __future__ import annotations

import re
import sys
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from patchsweep.cli.early import is_choice, keys_of, refuse_unknown
from patchsweep.data.records import REQUIRED
from patchsweep.data.tables import SUFFIXES
from patchsweep.errors import ConfigError
from patchsweep.models.gguf import BUNDLED

# group -> the key that takes a value which is not one of the group's choices
_MAIN_KEYS = {
    "model": "model.name",
    "task": "task.path",
    "sites": "sites.names",
    "method": "method.names",
    "metric": "metric.names",
    "store": "store.path",
}
_PROMPTS = tuple(f"task.{name}" for name in REQUIRED)
_OPTIONAL_PATHS = ("model.revision", "model.offload_folder", "means_from")
_PATHS = ("model.name", "task.path", "store.path", *_OPTIONAL_PATHS)
# functions of Hydra's grammar that sweep over values; only -m runs a sweep
_SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)

_SCALE = re.compile(r"(?<!['\"])scale\([^()]*\)")


def is_many(arguments: list[str]) -> bool:
    """Whether the words request several runs (-m)."""
    return not {"-m", "--multirun"}.isdisjoint(arguments)


def expand(arguments: list[str], verb: str = "run") -> list[str]:
    """Return the flags, then the overrides with short forms such as `sites=[q,k]` expanded.

    Flags come first, since argparse accepts no overrides on both sides of a flag. Values of paths
    and prompts are quoted; with `-m`, each of several paths is quoted by itself.

    Raises:
        ConfigError: a key is not known, or a required value is empty.
    """
    many = is_many(arguments)
    words = [word for word in arguments if not _is_override(word)]
    for argument in arguments:
        if _is_override(argument):
            words += _override(argument, many, verb)
    return words


def _override(word: str, many: bool, verb: str) -> list[str]:
    """Return the overrides that `word` expands to."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if not equals or name.partition(".")[0].partition("/")[0] == "hydra":
        return [word]
    free = refuse_unknown(name, keys_of(verb) or keys_of("run") or {}, verb)
    if name not in _MAIN_KEYS or is_choice(name, value):
        # known keys exist already, so + has a meaning only in a free mapping
        return [f"{'++' if free else ''}{name}={_value(name, value, many)}"]
    if not value:
        raise ConfigError(f"{name}= is empty; leave it out, or give a value")
    overrides = []
    if name == "model":
        overrides.append(f"model={_kind(_text(value))}")
    if name == "task":
        if not _text(value).lower().endswith(SUFFIXES):
            return [f"task={value}"]  # Hydra's error then lists the choices
        overrides.append("task=jsonl")
    if name in ("sites", "method", "metric") and not value.startswith("["):
        value = f"[{value}]"
    main = _MAIN_KEYS[name]
    return [*overrides, f"{main}={_value(main, value, many)}"]


def _value(key: str, value: str, many: bool) -> str:
    """Return `value` in Hydra's grammar: quoted if `key` is a path or a prompt.

    Of an intervention, the texts `scale(...)` are quoted, which Hydra takes for functions.
    """
    if key == "intervention":
        return _SCALE.sub(lambda found: _quote(found[0], interpolate=True), value)
    is_path = key in _PATHS
    if not is_path and key not in _PROMPTS:
        return value
    if key in _OPTIONAL_PATHS and value == "null":
        return value
    unquoted = _unquoted(value)
    if unquoted and (many or len(unquoted) == 1):
        texts = unquoted
    elif many and is_path:
        if _SWEEP.fullmatch(value):
            return value
        texts = value.split(",")
    else:
        texts = [value]
    for text in texts:
        _warn_of_escapes(key, text)
    return ",".join(_quote(text, interpolate=is_path) for text in texts)


def _text(value: str) -> str:
    """Return `value` without surrounding quotes of Hydra's grammar."""
    unquoted = _unquoted(value)
    return unquoted[0] if len(unquoted) == 1 else value


def _unquoted(value: str) -> list[str]:
    """Return the texts of one quoted value, or of several with commas; [] if it is not quoted."""
    if value[:1] not in ("'", '"'):
        return []
    try:
        parsed = _parser().parse_override(f"key={value}").value()
    except HydraException:
        return []  # a plain text that begins with a quote
    if isinstance(parsed, str):
        return [parsed]
    if isinstance(parsed, ChoiceSweep):
        return [x.text for x in parsed.list if isinstance(x, QuotedString)]
    return []


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _quote(text: str, *, interpolate: bool) -> str:
    """Return `text` quoted for Hydra's grammar; `interpolate`: Hydra resolves `${key}`."""
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text, Quote.single).with_quotes()


def _warn_of_escapes(key: str, text: str) -> None:
    if key in _PROMPTS and (escape := re.search(r"\\[nt]", text)):
        print(
            f"patchsweep: {key} holds {escape[0]} as two characters, a backslash and a letter; for "
            f"a line break or a tab write $'...{escape[0]}...' in the shell, or use a JSONL file",
            file=sys.stderr,
        )


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _kind(model: str) -> str:
    """Return the choice of the group `model` for a model's name."""
    return "tiny" if model.startswith("tiny:") else "smollm2" if model in BUNDLED else "hf"
