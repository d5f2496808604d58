"""RASP programs that Tracr compiles to causal transformers whose circuit is known.

Needs `tracr-pypi`, which brings jax and dm-haiku; only `compile.py` imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tracr.compiler import lib
from tracr.rasp import rasp

LETTERS = ("a", "b", "c")
NEXT = {"a": "b", "b": "c", "c": "a"}
tokens, indices = rasp.tokens, rasp.indices


@dataclass(frozen=True)
class Program:
    """A program and its vocabulary; `copies` says that components carry the same thing twice."""

    make: Callable[[], Any]
    vocab: tuple[Any, ...] = LETTERS
    copies: bool = False


def shift(by: int, what: Any) -> Any:
    """Return `what` as it was `by` tokens earlier."""
    chosen = rasp.Select(indices, indices, lambda k, q: k == q - by)
    return rasp.Aggregate(chosen, what, default=None).named(f"shift{by}_{what.name}")


def at(position: int, what: Any) -> Any:
    """Return `what` at one position, everywhere."""
    chosen = rasp.Select(indices, indices, lambda k, q: k == position)
    return rasp.Aggregate(chosen, what, default=None).named(f"at{position}_{what.name}")


def fraction(of: str) -> Any:
    """Return the share of the tokens so far that are `of`."""
    return lib.make_frac_prevs(rasp.numerical(tokens == of).named(f"is_{of}")).named(f"frac_{of}")


def fraction_again(of: str) -> Any:
    """Return `fraction(of)`, computed by other components."""
    same = rasp.numerical(rasp.Map(lambda t: t == of, tokens)).named(f"again_{of}")
    chosen = rasp.Select(indices, indices, lambda k, q: k <= q)
    return rasp.numerical(rasp.Aggregate(chosen, same, default=0)).named(f"frac_again_{of}")


def count(of: str, name: str = "count") -> Any:
    """Return how many of the tokens so far are `of`."""
    return rasp.SelectorWidth(rasp.Select(tokens, tokens, lambda k, q: k == of)).named(
        f"{name}_{of}"
    )


def both(f: Callable[[Any, Any], Any], x: Any, y: Any, name: str) -> Any:
    """Return f of two sequences."""
    return rasp.SequenceMap(f, x, y).named(name)


def mapped(f: Callable[[Any], Any], x: Any, name: str) -> Any:
    """Return f of a sequence."""
    return rasp.Map(f, x).named(name)


def after() -> Any:
    """Return the token that came after this one when it came before."""
    chosen = rasp.Select(shift(1, tokens), tokens, rasp.Comparison.EQ)
    return rasp.Aggregate(chosen, tokens, default=None).named("after")


def bigram() -> Any:
    """Return the last two tokens as one."""
    return both(lambda x, y: f"{x}{y}", shift(1, tokens), tokens, "bigram")


def is_in(what: str) -> Callable[[Any], bool]:
    """Return a test of membership."""
    return lambda t: t in what


def copy_of(by: int, which: str) -> Any:
    """Return the token `by` earlier, computed by a component of its own."""
    chosen = rasp.Select(indices, indices, lambda k, q: k == q - by)
    return rasp.Aggregate(chosen, tokens, default=None).named(f"copy_{which}")


PROGRAMS: dict[str, Program] = {
    "shift_1": Program(lambda: shift(1, tokens)),
    "shift_2": Program(lambda: shift(2, tokens)),
    "shift_3": Program(lambda: shift(3, tokens)),
    "shift_1_1": Program(lambda: shift(1, shift(1, tokens))),
    "shift_1_1_1": Program(lambda: shift(1, shift(1, shift(1, tokens)))),
    "first": Program(lambda: at(0, tokens)),
    "second": Program(lambda: at(1, tokens)),
    "next_letter": Program(lambda: mapped(NEXT.get, tokens, "next")),
    "next_twice": Program(lambda: mapped(NEXT.get, mapped(NEXT.get, tokens, "next"), "nextnext")),
    "next_of_previous": Program(lambda: mapped(NEXT.get, shift(1, tokens), "next")),
    "previous_of_next": Program(lambda: shift(1, mapped(NEXT.get, tokens, "next"))),
    "next_of_first": Program(lambda: mapped(NEXT.get, at(0, tokens), "next")),
    "fraction_a": Program(lambda: fraction("a")),
    "fraction_b": Program(lambda: fraction("b")),
    "fraction_ab": Program(
        lambda: lib.make_frac_prevs(
            rasp.numerical(mapped(is_in("ab"), tokens, "in_ab"))
        ).named("frac")
    ),
    "balance": Program(lambda: lib.make_pair_balance(tokens, "a", "b")),
    "balance_twice_a": Program(
        lambda: rasp.numerical(
            rasp.LinearSequenceMap(fraction("a"), fraction("b"), 2, -1)
        ).named("weighed")
    ),
    "balance_bc": Program(lambda: lib.make_pair_balance(tokens, "b", "c")),
    "mostly_a": Program(lambda: mapped(lambda x: x > 0.5, fraction("a"), "mostly")),
    "balance_is_positive": Program(
        lambda: mapped(lambda x: x >= 0, lib.make_pair_balance(tokens, "a", "b"), "positive")
    ),
    "count_a": Program(lambda: count("a")),
    "count_b": Program(lambda: count("b")),
    "histogram": Program(lambda: lib.make_hist()),
    "is_repeated": Program(lambda: mapped(lambda n: n > 1, lib.make_hist(), "repeated")),
    "more_a_than_b": Program(lambda: both(lambda x, y: x > y, count("a"), count("b"), "more")),
    "most_of_a_and_own": Program(
        lambda: both(max, count("a"), lib.make_hist(), "most")
    ),
    "same_as_previous": Program(
        lambda: both(lambda x, y: x == y, tokens, shift(1, tokens), "same")
    ),
    "same_as_first": Program(lambda: both(lambda x, y: x == y, tokens, at(0, tokens), "same")),
    "previous_is_first": Program(
        lambda: both(lambda x, y: x == y, shift(1, tokens), at(0, tokens), "same")
    ),
    "previous_two_agree": Program(
        lambda: both(lambda x, y: x == y, shift(1, tokens), shift(2, tokens), "same")
    ),
    "exclusive_or": Program(
        lambda: both(lambda x, y: (x == "a") != (y == "a"), tokens, shift(1, tokens), "xor")
    ),
    "bigram": Program(bigram),
    "trigram": Program(lambda: both(lambda x, y: f"{x}{y}", shift(2, tokens), bigram(), "trigram")),
    "bigrams_so_far": Program(
        lambda: rasp.SelectorWidth(
            rasp.Select(bigram(), bigram(), rasp.Comparison.EQ)
        ).named("bigrams"),
        LETTERS[:2],
    ),
    "pattern_ab": Program(lambda: lib.detect_pattern(tokens, "ab")),
    "pattern_aa": Program(lambda: lib.detect_pattern(tokens, "aa")),
    "pattern_abc": Program(lambda: lib.detect_pattern(tokens, "abc")),
    "after_last_time": Program(after),
    "odd_positions": Program(
        lambda: both(lambda t, i: NEXT[t] if i % 2 else t, tokens, indices, "odd")
    ),
    "like_the_first": Program(
        lambda: rasp.SelectorWidth(
            rasp.Select(tokens, at(0, tokens), rasp.Comparison.EQ)
        ).named("like_first")
    ),
    "copies_or": Program(
        lambda: both(
            lambda x, y: x == "a" or y == "a", copy_of(1, "x"), copy_of(1, "y"), "either"
        ),
        copies=True,
    ),
    "copies_and": Program(
        lambda: both(
            lambda x, y: x == "a" and y == "a", copy_of(1, "x"), copy_of(1, "y"), "both"
        ),
        copies=True,
    ),
    "copies_larger": Program(
        lambda: both(max, count("a", "count_x"), count("a", "count_y"), "larger"), copies=True
    ),
    "copies_mean": Program(
        lambda: rasp.numerical(
            rasp.LinearSequenceMap(fraction("a"), fraction_again("a"), 0.5, 0.5)
        ).named("mean"),
        copies=True,
    ),
}  # fmt: skip
