"""Checks of users' arguments: indices, counts, names and paths, returned as plain Python values."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchsweep.errors import ConfigError, ModelError, PatchsweepError, PlanError

Sets = tuple[tuple[int, ...], ...]
_HEAD = re.compile(r"\s*a(\d+)(?:\.h(\d+))?\s*")
RUNNERS = ("auto", "packed", "hooked")


def check_bridge(model: Any) -> None:
    """Raise unless `model` looks like a TransformerBridge, which `load_model` returns.

    Raises:
        ModelError: `model` is something else, such as a name, or wraps no transformers model.
    """
    # by attributes instead of the class, so that reading a store need not load torch
    if not all(hasattr(model, name) for name in ("cfg", "tokenizer", "original_model")):
        raise ModelError(
            f"model must be a TransformerBridge, got {_brief(model)}; give what "
            "patchsweep.load_model(name) returns"
        )
    if not hasattr(model.original_model, "config"):
        raise ModelError(
            f"model wraps a {type(model.original_model).__name__}, which is no model of "
            "transformers (boot_native makes such bridges); write its weights into a transformers "
            "model, such as GPT2LMHeadModel, and give TransformerBridge.boot_transformers that"
        )


def whole_number(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[PatchsweepError] = PlanError,
) -> int:
    """Return `value` as an int. `least` and `most` are included in the range.

    Raises:
        error: `value` is no whole number, or is out of range.
    """
    wanted = "a whole number"
    if least is not None and most is not None:
        wanted += f" from {least} to {most}"
    elif least is not None:
        wanted += f" of at least {least}"
    fits = is_whole(value) and (least is None or value >= least) and (most is None or value <= most)
    if not fits:
        raise error(f"{name}={_brief(value)} must be {wanted}")
    return int(value)


def one_of(
    name: str, value: Any, known: Sequence[str], *, error: type[PatchsweepError] = ConfigError
) -> None:
    """Raise unless `value` is one of the names in `known`.

    Raises:
        error: `value` is none of them.
    """
    if not isinstance(value, str) or value not in known:
        raise error(f"{name}={_brief(value)} is not known; use {_listed(known)}")


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    error: type[PatchsweepError] = PlanError,
) -> None:
    """Raise unless `value` is a finite number between `above` and `below`, both excluded.

    Raises:
        error: `value` is no such number.
    """
    fits = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    fits = fits and math.isfinite(value)
    fits = fits and (above is None or value > above) and (below is None or value < below)
    if not fits:
        rule = {"above": above, "below": below}
        words = " and ".join(f"{key} {end}" for key, end in rule.items() if end is not None)
        raise error(f"{name}={_brief(value)} must be a number {words}".rstrip())


def true_or_false(
    name: str, value: Any, *, none: bool = False, error: type[PatchsweepError] = ConfigError
) -> None:
    """Raise unless `value` is True or False, or None if `none` allows it.

    Raises:
        error: `value` is something else.
    """
    if not (isinstance(value, bool) or (none and value is None)):
        known = "True, False or None" if none else "True or False"
        raise error(f"{name}={_brief(value)} must be {known}")


def index_sets(name: str, given: Any) -> Sets:
    """Return sets of indices that are patched together: `[0, [1, 2]]` gives `((0,), (1, 2))`.

    One index counts as a list of one; ranges, arrays and tensors of whole numbers count as lists.
    An empty list stays empty.

    Raises:
        PlanError: an entry is no index, or occurs twice.
    """
    sets = tuple(_members(name, entry) for entry in _entries(name, given))
    _refuse_twice(name, [frozenset(members) for members in sets], sets)
    return sets


def position_axis(given: Any) -> tuple[int | str, ...]:
    """Return positions and labels, one patch each; a single one counts as a list of one.

    Raises:
        PlanError: an entry is neither a position nor a label, or occurs twice.
    """
    axis: list[int | str] = []
    for entry in _entries("positions", given):
        if not is_whole(entry) and not isinstance(entry, str):
            raise PlanError(
                f"positions has {_brief(entry)}, which is neither a position nor a label; give "
                "such as [0, 5] or ['subject'], or 'all' for one patch over all"
            )
        axis.append(entry if isinstance(entry, str) else int(entry))
    _refuse_twice("positions", axis, axis)
    return tuple(axis)


def head_places(
    given: Sequence[Any], n_layers: int, n_heads: int, name: str = "heads"
) -> tuple[tuple[int, int], ...]:
    """Return heads as (layer, head); an entry is such a pair, or a name such as `a23.h3`.

    A negative layer counts from the end. `a23` stands for all heads of layer 23.

    Raises:
        PlanError: an entry names no head of a model of that size, or one twice.
    """
    found = []
    for entry in given:
        named = _HEAD.fullmatch(entry) if isinstance(entry, str) else None
        if named and named[2] is None and int(named[1]) < n_layers:
            found += [(int(named[1]), head) for head in range(n_heads)]
            continue
        place = [int(number or 0) for number in named.groups()] if named else entry
        if not (isinstance(place, list | tuple) and len(place) == 2 and all(map(is_whole, place))):
            raise PlanError(
                f"{name} has {entry!r}; give (layer, head) pairs, such as (3, 1), or names, such "
                "as 'a3.h1', or 'a3' for all of a layer"
            )
        layer, head = (int(number) for number in place)
        if not (-n_layers <= layer < n_layers and 0 <= head < n_heads):
            raise PlanError(
                f"{name}: {entry!r} is no head of {n_layers} layers of {n_heads}; the last is "
                f"a{n_layers - 1}.h{n_heads - 1}"
            )
        found.append((layer % n_layers, head))
    if len(set(found)) < len(found):
        raise PlanError(f"{name}={list(given)} names a head twice; name each once")
    return tuple(found)


def user_path(path: str | Path) -> Path:
    """Return `path` with `~` or `~user` expanded at its start; `~x` stays if there is no user x."""
    return Path(os.path.expanduser(path))


def check_runner(runner: Any, max_tokens: Any, cache_budget: Any = None) -> None:
    """Check the options of runners: `max_tokens` a packed batch, `cache_budget` in bytes.

    Raises:
        ConfigError: the runner is not known, or a number is out of range.
    """
    one_of("runner", runner, RUNNERS)
    if max_tokens is not None:
        whole_number("max_tokens", max_tokens, least=1, error=ConfigError)
    if cache_budget is not None and not (
        isinstance(cache_budget, int | float) and not isinstance(cache_budget, bool)
    ):
        raise ConfigError(f"cache_budget={_brief(cache_budget)} must be a number of bytes")
    if cache_budget is not None and not cache_budget >= 0:
        raise ConfigError(f"cache_budget={cache_budget} must be 0 or more, such as 8e9")


def check_store_path(store: Any) -> None:
    """Raise unless `store` names a folder of its own, or a URL.

    Raises:
        ConfigError: `store` is empty, no path, or begins with a dash, which commands read as an
            option.
    """
    if not isinstance(store, str | os.PathLike):
        raise ConfigError(f"store={_brief(store)} must be a path or a URL, such as 'runs/a.zarr'")
    text = os.fspath(store)
    if "://" in str(text):
        return
    named = isinstance(text, str) and text.strip() and Path(text).name not in ("", "..")
    if not named or "\0" in text:
        raise ConfigError(f"store={text!r} names no folder of its own; give such as 'runs/a.zarr'")
    if text.startswith("-"):
        raise ConfigError(
            f"store={text!r} begins with a dash, which commands take for an option; give './{text}'"
        )


def check_tolerance(tolerance: float | str | None) -> None:
    """Raise ConfigError unless `tolerance` is a positive number, a percentage or None."""
    if tolerance is None:
        return
    number: Any = tolerance
    if isinstance(tolerance, str) and tolerance.endswith("%"):
        try:
            number = float(tolerance.removesuffix("%"))
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ConfigError(
            f"tolerance={tolerance!r} must be a positive number in units of the metric, such as "
            "0.01, or a share of the difference between source and base, such as '1%'"
        )


def check_config(config: Any) -> None:
    """Raise unless `config` is what results keep of a run's settings.

    Raises:
        ConfigError: it is no mapping, or holds something that JSON does not know.
    """
    if config is None:
        return
    try:
        json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError(
            f"config={_brief(config)} must be a mapping of what JSON knows; leave it out, or give "
            "names and numbers"
        ) from None


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer of Python or numpy; False for booleans."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _entries(name: str, given: Any) -> list[Any]:
    """Return `given` as a list; a single index becomes a list of one."""
    if is_whole(given):
        return [given]
    if hasattr(given, "tolist"):  # an array, or a tensor
        given = given.tolist()
    if not isinstance(given, list | tuple | range):
        raise PlanError(
            f"{name}={_brief(given)} must be an index or a list of them, such as [0, 1]"
        )
    return list(given)


def _members(name: str, entry: Any) -> tuple[int, ...]:
    """Return the indices of one entry, which is an index or a list of indices."""
    is_set = isinstance(entry, list | tuple | range) or hasattr(entry, "tolist")
    members = _entries(name, entry) if is_set and not is_whole(entry) else [entry]
    for member in members:
        if not is_whole(member):
            raise PlanError(
                f"{name} has {_brief(member)}, which is no index; use whole numbers, such as "
                "[0, 1], or [[0, 1]] for both at once"
            )
    if len(set(members)) < len(members):
        raise PlanError(f"{name} has {_brief(entry)}, which names an index twice; name each once")
    return tuple(int(member) for member in members)


def _refuse_twice(name: str, keys: Sequence[Any], entries: Sequence[Any]) -> None:
    if len(set(keys)) == len(keys):
        return
    repeated = next(entry for key, entry in zip(keys, entries, strict=True) if keys.count(key) > 1)
    if isinstance(repeated, tuple):
        repeated = repeated[0] if len(repeated) == 1 else list(repeated)
    raise PlanError(f"{name} names {repeated!r} twice; name each once")


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _brief(value: Any) -> str:
    """Return a value as an error message shows it, in at most 80 characters."""
    if isinstance(value, str | int | float | bool | list | tuple | dict | set | type(None)):
        text = repr(value)
    else:
        text = f"{type(value).__name__} object"
    return text if len(text) <= 80 else f"{text[:77]}..."
