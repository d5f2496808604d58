"""From the words of a command line to Hydra's overrides: short forms, and texts taken literally.

Hydra reads a value by a grammar of its own, in which brackets, quotes, `~`, `=`, commas and
backslashes mean something. Paths and prompts are no such thing, so their values are quoted here.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from patchsweep.cli.keys import refuse_unknown
from patchsweep.cli.schema.run import RunConfig
from patchsweep.data.records import REQUIRED
from patchsweep.errors import ConfigError
from patchsweep.models.bundled import BUNDLED

# group -> the key that a value goes to which is none of the group's choices
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
# what sweeps over values in Hydra's grammar, where -m asks for a sweep
_SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)


def conf_folder() -> Path:
    """The folder of the config groups: inside an installed package, or at a checkout's root.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"the config groups are missing: there is no conf/config.yaml in {package} nor in "
        f"{package.parents[1]}; install patchsweep from a wheel, or run it from a whole checkout"
    )


def is_many(arguments: list[str]) -> bool:
    """Whether the words ask for many runs (-m)."""
    return not {"-m", "--multirun"}.isdisjoint(arguments)


def expand(
    arguments: list[str], verb: str = "run", schema: type[RunConfig] = RunConfig
) -> list[str]:
    """Flags, then overrides in which short forms such as `sites=[q,k]` are spelled out.

    Flags first, wherever they were: argparse takes no overrides on both sides of a flag. Values of
    paths and prompts are quoted; where `-m` sweeps, each of several paths by itself.

    Raises:
        ConfigError: a key is not known, or a value that is needed is empty.
    """
    many = is_many(arguments)
    words = [word for word in arguments if not _is_override(word)]
    for argument in arguments:
        if _is_override(argument):
            words += _override(argument, many, verb, schema)
    return words


def _override(word: str, many: bool, verb: str, schema: type[RunConfig]) -> list[str]:
    """The overrides that `word` stands for."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if not equals or name.partition(".")[0].partition("/")[0] == "hydra":
        return [word]
    free = refuse_unknown(name, schema, verb)
    if name not in _MAIN_KEYS or _is_choice(name, value):
        # what is known is there already, so that + adds nothing but in a mapping of the user's own
        return [f"{'++' if free else ''}{name}={_value(name, value, many)}"]
    if not value:
        raise ConfigError(f"{name}= is empty; leave it out, or give a value")
    overrides = []
    if name == "model":
        overrides.append(f"model={_kind(_text(value))}")
    if name == "task":
        if not _text(value).lower().endswith(".jsonl"):
            return [f"task={value}"]  # Hydra says what the choices are
        overrides.append("task=jsonl")
    if name in ("sites", "method", "metric") and not value.startswith("["):
        value = f"[{value}]"
    main = _MAIN_KEYS[name]
    return [*overrides, f"{main}={_value(main, value, many)}"]


def _value(key: str, value: str, many: bool) -> str:
    """`value` as Hydra's grammar takes it: quoted where `key` is a path's or a prompt's."""
    is_path = key in _PATHS
    if not is_path and key not in _PROMPTS:
        return value
    if key in _OPTIONAL_PATHS and value == "null":
        return value
    given = _unquoted(value)
    if given and (many or len(given) == 1):
        texts = given
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
    """`value` without the quotes of Hydra's grammar around it."""
    given = _unquoted(value)
    return given[0] if len(given) == 1 else value


def _unquoted(value: str) -> list[str]:
    """The text of a value in quotes, or of several with commas between; none: it is not quoted."""
    if value[:1] not in ("'", '"'):
        return []
    try:
        found = _parser().parse_override(f"key={value}").value()
    except HydraException:
        return []  # a text that happens to begin with a quote
    if isinstance(found, str):
        return [found]
    if isinstance(found, ChoiceSweep):
        return [x.text for x in found.list if isinstance(x, QuotedString)]
    return []


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _quote(text: str, *, interpolate: bool) -> str:
    """`text` in quotes of Hydra's grammar; `interpolate`: `${key}` stands for that key's value."""
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text, Quote.single).with_quotes()


def _warn_of_escapes(key: str, text: str) -> None:
    if key in _PROMPTS and (found := re.search(r"\\[nt]", text)):
        print(
            f"patchsweep: {key} holds {found[0]} as two characters, a backslash and a letter; for "
            f"a line break or a tab write $'...{found[0]}...' in the shell, or use a JSONL file",
            file=sys.stderr,
        )


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _kind(model: str) -> str:
    """The choice of the group model that a model's name belongs to."""
    return "tiny" if model.startswith("tiny:") else "smollm2" if model in BUNDLED else "hf"


def _is_choice(group: str, value: str) -> bool:
    """Whether Hydra finds a file for the value, or for one of several values of a sweep."""
    choices = {path.stem for path in (conf_folder() / group).glob("*.yaml")}
    return any(word in choices for word in value.split(","))
