"""Mistakes in the words of a command, told before torch is imported: keys, choices and sites.

The keys are those of the config's dataclasses, read from their source: importing the dataclasses
imports what they configure, which takes seconds. What lies below a field of a class from elsewhere
is left to Hydra, as is the type of a value.
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
_PLAIN = {"str", "int", "float", "bool", "list[str]", "list[Any]"}  # without keys below


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
    return any(word in choices for word in value.split(","))


def refuse(verb: str, words: Sequence[str]) -> None:
    """Raise for a word that `verb` does not take.

    Raises:
        PatchsweepError: an option, a key, a choice of a group or a site is not known, or a key is
            of sweeps alone.
    """
    parsers.check(verb, words)
    keys = _keys_of(verb)
    if keys is None:
        return
    if any("=" not in word and word not in _USUAL_FLAGS for word in words):
        from patchsweep.cli.flags import check_flags  # a local import: it takes 0.2 s

        check_flags(verb, words)
    refused = _refused(verb)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        root = name.partition(".")[0].partition("/")[0]
        if not equals or word.startswith(("-", "~")) or root == "hydra":
            continue
        short = f"{name}.names" if value and not is_choice(name, value) else name
        for part in (root, name, short):
            if part in refused:
                raise ConfigError(f"{word}: {refused[part]}")
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


def flat(keys: Keys, before: str = "") -> Iterator[str]:
    """Yield every key, those below others as `group.key`."""
    for name, below in keys.items():
        yield f"{before}{name}"
        yield from flat(below, f"{before}{name}.")


def _keys_of(verb: str) -> Keys | None:
    """Return the keys of the verb's config; None: it has none."""
    classes = _classes()
    schema = "RunConfig" if verb == "run" else f"{verb.capitalize()}Run"
    if schema not in classes:
        return None
    groups = _groups()
    keys = dict(_fields(schema, classes))
    for group, members in groups.items():
        keys[group] = dict(item for one in members for item in _fields(one, classes).items())
    return keys


def _refused(verb: str) -> dict[str, str]:
    """Return the keys that the verb of an analysis refuses, each with the message after it."""
    node = _classes().get(f"{verb.capitalize()}Run")
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


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """Return the classes of the command line's modules, by name."""
    found = {}
    for path in sorted([*_HERE.glob("*.py"), *(_HERE / "schema").glob("*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
    return found


def _fields(name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, Keys]:
    """Return the fields of a dataclass and of its bases, each with the keys below it."""
    node = classes[name]
    fields: dict[str, Keys] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= _fields(base.id, classes)
    for entry in node.body:
        if not isinstance(entry, ast.AnnAssign) or not isinstance(entry.target, ast.Name):
            continue
        kind = ast.unparse(entry.annotation).removesuffix(" | None")
        if kind.startswith("ClassVar"):
            continue
        below: Keys = ANY
        if kind in classes:
            below = _fields(kind, classes)
        elif kind in _PLAIN:
            below = {}
        fields[entry.target.id] = below
    return fields


def _groups() -> dict[str, list[str]]:
    """Return the config groups, each with the names of its classes."""
    for node in ast.parse((_HERE / "schema" / "run.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "GROUPS":
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {
                ast.literal_eval(group): [ast.unparse(key) for key in members.keys if key]
                for group, members in pairs
                if group is not None and isinstance(members, ast.Dict)
            }
    raise AssertionError("schema/run.py has no GROUPS")
