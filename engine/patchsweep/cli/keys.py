"""The keys that a command line may set: the fields of the config's dataclasses."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from hydra.conf import HydraConf

from patchsweep.cli.early import ANY, Keys, flat
from patchsweep.cli.schema.run import GROUPS, RunConfig


def keys_of(schema: type[RunConfig]) -> Keys:
    """Return every key of `schema`; a group has the keys of all its classes."""
    keys = dict(_of_class(schema))
    for group, classes in GROUPS.items():
        keys[group] = {name: below for one in classes for name, below in _of_class(one).items()}
    return keys


def elsewhere(key: str, chosen: type | None) -> str:
    """Return the error message for a `key` that the chosen class of its group does not have."""
    group, _, name = key.partition(".")
    if group == "hydra":
        near = get_close_matches(key, [f"hydra.{name}" for name in flat(_of_class(HydraConf))])
        meant = f"did you mean {near[0]}? " if near else ""
        return f"key {key!r} is not known; {meant}`patchsweep run --hydra-help` says more"
    if any(_of_class(one).get(name) is ANY for one in GROUPS.get(group, {})):
        return f"{key} is a mapping; give its entries one by one, such as {key}.name=value"
    owners = [
        schema.partition("_")[0]
        for one, schema in GROUPS.get(group, {}).items()
        if name.partition(".")[0] in _of_class(one)
    ]
    text = f"key {key!r} is not known here"
    if chosen is not None and is_dataclass(chosen):
        text += f"; those of the {group} that was chosen are {', '.join(_of_class(chosen))}"
    if owners and "schema" not in owners:
        text += f"; {name} belongs to {' and '.join(f'{group}={owner}' for owner in owners)}"
    return text


def _of_class(one: type) -> Keys:
    hints = get_type_hints(one)
    keys: dict[str, Keys] = {}
    for field in fields(one):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            keys[field.name] = _of_class(hint)
        else:
            open_ended = hint is Any or str(hint).startswith("dict")
            keys[field.name] = ANY if open_ended else {}
    return keys
