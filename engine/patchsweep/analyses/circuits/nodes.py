"""The ends of an edge: what writes into the residual stream, and what reads it.

Pure: names and numbers, no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import PlanError


@dataclass(frozen=True)
class Sender:
    """Something that writes into the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int  # embed: -1
    head: int | None = None

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}"


@dataclass(frozen=True)
class Reader:
    """Something that reads the residual stream, with its norm if it has one."""

    kind: Literal["q", "k", "v", "mlp", "logits"]
    layer: int  # logits: the number of layers
    head: int | None = None  # of k and v: the key-value head

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}.{self.kind}"


@dataclass(frozen=True)
class Edge:
    """What `sender` writes, as far as `reader` alone sees it."""

    sender: Sender
    reader: Reader
    pos: int | None = None  # the reader sees the change at this position alone; None: at all

    def __str__(self) -> str:
        where = "" if self.pos is None else f"@{self.pos}"
        return f"{self.sender}->{self.reader}{where}"


EdgeLike = Edge | str | tuple[str, str] | tuple[str, str, int]
_LABELS = re.compile(r"\s*(?P<sender>[\w.]+)\s*->\s*(?P<reader>[\w.]+)\s*(?:@\s*(?P<pos>\d+))?\s*")


def _written(given: Edge | Sequence[str | int]) -> str:
    """Its labels as one."""
    if isinstance(given, Edge):
        return str(given)
    ends, pos = given[:2], given[2:]
    return "->".join(str(end) for end in ends) + "".join(f"@{p}" for p in pos)


@dataclass(frozen=True)
class Nodes:
    """All senders and readers of a model, in the order of the forward pass."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: tuple[bool, ...]  # per layer: the MLP reads what its attention reads

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """embed, then the heads and the MLP of each layer."""
        found = [Sender("embed", -1)]
        for layer in range(self.n_layers):
            found += [Sender("head", layer, head) for head in range(self.n_heads)]
            found.append(Sender("mlp", layer))
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """Per layer q of the heads, k and v of the key-value heads, the MLP; then the logits."""
        found = []
        for layer in range(self.n_layers):
            found += [Reader("q", layer, head) for head in range(self.n_heads)]
            found += [Reader("k", layer, head) for head in range(self.n_kv_heads)]
            found += [Reader("v", layer, head) for head in range(self.n_kv_heads)]
            found.append(Reader("mlp", layer))
        return (*found, Reader("logits", self.n_layers))

    def of_layer(self, layer: int) -> slice:
        """The readers of a layer; at `n_layers` the logits."""
        size = self.n_heads + 2 * self.n_kv_heads + 1
        return slice(layer * size, min((layer + 1) * size, len(self.readers)))

    def n_seen(self, reader: Reader) -> int:
        """How many senders `reader` sees: the first ones, since they stand in forward order."""
        if reader.kind == "logits":
            return len(self.senders)
        before = 1 + reader.layer * (self.n_heads + 1)
        if reader.kind == "mlp" and not self.parallel[reader.layer]:
            return before + self.n_heads
        return before

    @cached_property
    def possible(self) -> NDArray[np.bool_]:
        """[sender, reader] whether there is such an edge."""
        seen = np.array([self.n_seen(reader) for reader in self.readers])
        return np.arange(len(self.senders))[:, None] < seen[None, :]

    @property
    def n_edges(self) -> int:
        return int(self.possible.sum())

    def edge(self, given: EdgeLike) -> Edge:
        """The edge of two labels such as `("a3.h2", "a7.h1.q")`, or of `"a3.h2->a7.h1.q"`; at one
        position, `("a3.h2", "a7.h1.q", 16)` or `"a3.h2->a7.h1.q@16"`.

        Raises:
            PlanError: there is no such sender, reader or edge.
        """
        found = _LABELS.fullmatch(given if isinstance(given, str) else _written(given))
        if found is None:
            raise PlanError(
                f"edge {given!r} does not name a sender and a reader; write ('a3.h2', 'a7.h1.q') "
                "or 'a3.h2->a7.h1.q', at position 16 ('a3.h2', 'a7.h1.q', 16)"
            )
        sender, reader = found["sender"], found["reader"]
        if sender not in self._senders:
            raise PlanError(
                f"edge {given!r}: there is no sender {sender!r}; use embed, a0.h0 .. "
                f"a{self.n_layers - 1}.h{self.n_heads - 1} or m0 .. m{self.n_layers - 1}"
            )
        if reader not in self._readers:
            raise PlanError(
                f"edge {given!r}: there is no reader {reader!r}; use a0.h0.q .. "
                f"a{self.n_layers - 1}.h{self.n_heads - 1}.q, k and v of heads 0 .. "
                f"{self.n_kv_heads - 1}, m0 .. m{self.n_layers - 1} or logits"
            )
        if not self.possible[self._senders[sender], self._readers[reader]]:
            raise PlanError(
                f"edge {given!r}: {reader} reads the residual stream before {sender} writes "
                "into it; choose a reader that comes later"
            )
        return Edge(
            self.senders[self._senders[sender]],
            self.readers[self._readers[reader]],
            None if found["pos"] is None else int(found["pos"]),
        )

    def sender_index(self, sender: Sender) -> int:
        """Its place in `senders`."""
        return self._senders[str(sender)]

    @cached_property
    def _senders(self) -> dict[str, int]:
        return {str(sender): i for i, sender in enumerate(self.senders)}

    @cached_property
    def _readers(self) -> dict[str, int]:
        return {str(reader): i for i, reader in enumerate(self.readers)}
