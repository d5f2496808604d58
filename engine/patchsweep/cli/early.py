"""Mistakes in the words of a command, told before torch is imported: keys, choices and sites.

The keys are those of the config's dataclasses, read from their source: importing the dataclasses
imports what they configure, which takes seconds. The type of a value is left to Hydra.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from patchsweep.cli import parsers
from patchsweep.data.tables import SUFFIXES
from patchsweep.errors import ConfigError
from patchsweep.spec.sites import get_sites

Keys = Mapping[str, "Keys"]
ANY: Keys = MappingProxyType({})  # below a free mapping, such as task.options

_HERE = Path(__file__).parent
# keys of a sweep that an analysis may do without; each names those that it uses
OF_SWEEPS = (
    "sites", "method", "metric", "runner", "intervention", "direction", "means_from", "precision",
    "compute_dtype", "tolerance",
)  # fmt: skip
_SWEEPS = ("run", "plan")
_USUAL_FLAGS = ("-m", "--multirun", "-h", "--help")


def conf_folder() -> Path:
    """Return the folder of the config groups: in an installed package, or at a checkout's root.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"the config groups are missing: there is no conf/config.yaml in {package} nor in "
        f"{package.parents[1]}; install patchsweep from a wheel, or run it from a whole checkout"
    )


def choices_of(group: str) -> list[str]:
    """Return the names of the files of a config group, sorted."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def is_choice(group: str, value: str) -> bool:
    """Whether the config group has a file for `value`, or for one of several values of a sweep."""
    choices = choices_of(group)
    return not value.startswith("[") and any(word in choices for word in value.split(","))


def refuse(verb: str, words: Sequence[str]) -> None:
    """Raise for a word that `verb` does not take.

    Raises:
        PatchsweepError: an option, a key, a choice of a group or a site is not known, or a key is
            of sweeps alone.
    """
    parsers.check(verb, words)
    keys = keys_of(verb)
    if keys is None:
        return
    if any("=" not in word and word not in _USUAL_FLAGS for word in words):
        from patchsweep.cli.flags import check_flags  # a local import: it takes 0.2 s

        check_flags(verb, words)
    messages = refused(verb)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        root = name.partition(".")[0].partition("/")[0]
        if not equals or word.startswith(("-", "~")) or root == "hydra":
            continue
        short = f"{name}.names" if value and not is_choice(name, value) else name
        for part in (root, name, short):
            if part in messages:
                raise ConfigError(f"{word}: {messages[part]}")
        refuse_unknown(name, keys, verb)
        if not value or is_choice(name, value) or set(value) & set("[]{}()'\",$"):
            continue  # Hydra reads what is no plain word
        if name == "task" and value.lower().endswith(SUFFIXES):
            continue
        if name == "task" or (name == "runner" and verb in _SWEEPS):
            raise ConfigError(f"{word} is not known; use one of {', '.join(choices_of(name))}")
        if name == "sites" and verb in _SWEEPS:
            get_sites([value])


def refuse_unknown(key: str, keys: Keys, verb: str) -> bool:
    """Return whether `key` lies in a free mapping of `keys`, which accepts any name.

    Raises:
        ConfigError: it is not known.
    """
    at, parts = keys, key.split(".")
    for depth, part in enumerate(parts, start=1):
        if part not in at:
            raise ConfigError(_unknown(key, keys, verb))
        at = at[part]
        if at is ANY:
            return depth < len(parts)
    return False


def _unknown(key: str, keys: Keys, verb: str) -> str:
    """Return the error message for an unknown `key`, with similar keys."""
    all_keys = list(flat(keys))
    last = key.rpartition(".")[2]
    close = [name for name in all_keys if name.rpartition(".")[2] == last]
    close += get_close_matches(key, all_keys, n=2, cutoff=0.7)
    near = " or ".join(dict.fromkeys(close[:3]))
    meant = f"did you mean {near}? " if near else ""
    return f"key {key!r} is not known; {meant}`patchsweep {verb} --help` lists all keys"


def flat(keys: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield every key, those below others as `group.key`."""
    for name, below in keys.items():
        yield f"{before}{name}"
        if isinstance(below, Mapping):
            yield from flat(below, f"{before}{name}.")


@cache
def keys_of(verb: str) -> Keys | None:
    """Return the keys of the verb's config; a group has those of all its classes.

    None: the verb has no config.
    """
    schema = "RunConfig" if verb == "run" else f"{verb.capitalize()}Run"
    if _class(schema) is None:
        return None
    keys = dict(fields_of(schema))
    for group, members in groups().items():
        keys[group] = {name: below for one in members for name, below in fields_of(one).items()}
    return keys


def fields_of(name: str) -> Keys:
    """Return the fields of a dataclass and of its bases, each with the keys below it."""
    node = _class(name)
    fields: dict[str, Keys] = {}
    for base in node.bases if node else ():
        fields |= fields_of(ast.unparse(base))
    for entry in node.body if node else ():
        if not isinstance(entry, ast.AnnAssign):
            continue
        kind = ast.unparse(entry.annotation).removesuffix(" | None")
        if not kind.startswith("ClassVar"):
            is_free = kind == "Any" or kind.startswith("dict")
            fields[ast.unparse(entry.target)] = ANY if is_free else fields_of(kind)
    return fields


@cache
def groups() -> dict[str, dict[str, str]]:
    """Return the config groups: their classes, by name, with the names of their schemas."""
    for node in _body(_HERE / "schema" / "run.py"):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "GROUPS":
            return {
                group.strip("'"): {one: ast.literal_eval(name) for one, name in _items(members)}
                for group, members in _items(node.value)
            }
    raise AssertionError("schema/run.py has no GROUPS")


def _items(node: ast.expr | None) -> list[tuple[str, ast.expr]]:
    """Return the keys of a dictionary as they are written, and its values."""
    assert isinstance(node, ast.Dict)
    return [(ast.unparse(k), v) for k, v in zip(node.keys, node.values, strict=True) if k]


def refused(verb: str) -> dict[str, str]:
    """Return the keys that the verb of an analysis refuses, each with the message after it."""
    node = _class(f"{verb.capitalize()}Run")
    said: dict[str, Any] = {}
    for entry in node.body if node else ():
        if isinstance(entry, ast.AnnAssign) and ast.unparse(entry.annotation) == "ClassVar":
            assert entry.value is not None
            said[ast.unparse(entry.target)] = ast.literal_eval(entry.value)
    if "uses" not in said:  # a sweep, or its plan
        return {}
    text = f"{said['subject']} no {{}}; leave it out (`patchsweep {verb} -h`)"
    unused = {key: text.format(key) for key in OF_SWEEPS if key not in said["uses"]}
    return unused | said.get("instead", {})


def _class(name: str) -> ast.ClassDef | None:
    """Return a class of the command line's modules, or one that a module imports from another."""
    classes, imports = _sources()
    if name in classes or name not in imports:
        return classes.get(name)
    path = _HERE.parents[1].joinpath(*imports[name].split(".")).with_suffix(".py")
    nodes = _body(path) if path.is_file() else []
    return next((x for x in nodes if isinstance(x, ast.ClassDef) and x.name == name), None)


@cache
def _sources() -> tuple[dict[str, ast.ClassDef], dict[str, str]]:
    """Return the classes of the command line's modules, and the modules of imported names."""
    modules = sorted([*_HERE.glob("*.py"), *(_HERE / "schema").glob("*.py")])
    nodes = [node for path in modules for node in _body(path)]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return (
        {node.name: node for node in nodes if isinstance(node, ast.ClassDef)},
        {one.name: str(node.module) for node in imports for one in node.names},
    )


@cache
def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body
