"""Differences between two runs: of their identities or attributes, in words.

An identity (see `patchsweep.sweeps.identity`) is a tree of JSON under the attribute `identity`.
Results with an identity never equal results without one. Results of a function without a version
equal no others, since equal descriptions do not show that such functions are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from patchsweep.store.attributes import attributes

ADAPTIVE = "adaptive"  # attribute that the first process of a run decides, and the others read
ORIGIN = "pairs_origin"  # attribute that says how the pairs were made; the identity holds them
IDENTITY = "identity"  # attribute that holds the identity
DIGEST = "digest"  # key of the identity that holds one hash of all other keys
UNVERSIONED = "without a version"  # ends the description of a function without a version
PAIR_DIGITS = 8  # hex digits of each pair's digest; one string joins those of all pairs


def attribute_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield a clause for each difference between two sets of attributes, the identities' first."""
    mine, theirs = (
        {key: value for key, value in attributes(attrs).items() if key not in (ADAPTIVE, ORIGIN)}
        for attrs in (mine, theirs)
    )
    identity, their_identity = mine.get(IDENTITY), theirs.get(IDENTITY)
    if isinstance(identity, Mapping) and isinstance(their_identity, Mapping):
        difference = identity_difference(identity, their_identity)
        if difference is not None:
            yield difference
        del mine[IDENTITY], theirs[IDENTITY]
    yield from differences("attrs", mine, theirs)


def identity_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return a clause on the first difference between two identities; None if they are equal."""
    for identity in (mine, theirs):
        function = unversioned(identity)
        if function is not None:
            return f"{function} may be another function than the one of that name in the store"
    for key in dict.fromkeys([*mine, *theirs]):
        value, their_value = mine.get(key), theirs.get(key)
        if key == DIGEST or value == their_value:
            continue
        if isinstance(value, Mapping) and isinstance(their_value, Mapping):
            if key == "model" and {**value, "weights": ""} == {**their_value, "weights": ""}:
                return "the weights differ"
            if key == "prompts":
                return _prompts_difference(value, their_value)
        return next(differences("", {key: value}, {key: their_value}, str))
    return None


def unversioned(identity: Any) -> str | None:
    """Return the first function in `identity` without a version; None if all have one."""
    if isinstance(identity, str):
        return identity if identity.endswith(UNVERSIONED) else None
    if isinstance(identity, Mapping):
        identity = list(identity.values())
    if isinstance(identity, list | tuple):
        return next((name for name in map(unversioned, identity) if name is not None), None)
    return None


def differences(
    path: str, mine: Any, theirs: Any, words: Callable[[Any], str] = repr
) -> Iterator[str]:
    """Yield a clause for each place where two trees of JSON differ, in the order of `mine`."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            inner = f"{path}.{key}" if path else key
            if key not in mine or key not in theirs:
                yield f"{inner} is only in {'this run' if key in mine else 'the store'}"
            else:
                yield from differences(inner, mine[key], theirs[key], words)
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            yield from differences(f"{path}[{i}]", a, b, words)
        if len(mine) != len(theirs):
            yield differ(f"the length of {path}", len(mine), len(theirs))
    elif mine != theirs or type(mine) is not type(theirs):
        yield differ(path, mine, theirs, words)


def differ(path: str, mine: Any, theirs: Any, words: Callable[[Any], str] = repr) -> str:
    """Return a clause that says that two values differ, and shows both."""
    return f"{path} is {_brief(words(mine))} in this run and {_brief(words(theirs))} in the store"


def _brief(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _prompts_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if mine["n_pairs"] != theirs.get("n_pairs"):
        return differ("the number of prompt pairs", mine["n_pairs"], theirs.get("n_pairs"))
    kinds = [k for k in mine if k not in ("n_pairs", "each") and mine[k] != theirs.get(k)]
    digits = zip(mine["each"], str(theirs.get("each")), strict=False)
    first = next((i // PAIR_DIGITS for i, (a, b) in enumerate(digits) if a != b), None)
    place = "" if first is None else f", first in pair {first}"
    return f"the {' and '.join(kinds)} differ{place}"
