"""Shapes in signatures are checked while tests run."""

from __future__ import annotations

from typing import TypeVar

from beartype import beartype

T = TypeVar("T")


def checked(item: T) -> T:
    """`item` under beartype; a function inside another stays as it is.

    Its check would be compiled anew in each call of the outer one: 2 ms, thousands of times a
    sweep. No such function has shapes in its signature.
    """
    return item if "<locals>" in getattr(item, "__qualname__", "") else beartype(item)
