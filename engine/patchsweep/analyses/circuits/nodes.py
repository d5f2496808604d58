"""Senders and readers of the residual stream, and edges between them.

Pure: names and numbers, no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import PlanError


@dataclass(frozen=True)
class Sender:
    """A component that writes into the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int  # embed: -1
    head: int | None = None

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}"


@dataclass(frozen=True)
class Reader:
    """A component that reads the residual stream, through its norm if it has one."""

    kind: Literal["q", "k", "v", "mlp", "logits"]
    layer: int  # logits: the number of layers
    head: int | None = None  # of k and v: the key-value head

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}.{self.kind}"


@dataclass(frozen=True)
class Edge:
    """The path from the write of `sender` to the input of `reader`."""

    sender: Sender
    reader: Reader
    pos: int | None = None  # the only position at which the reader's input changes; None: all

    def __str__(self) -> str:
        where = "" if self.pos is None else f"@{self.pos}"
        return f"{self.sender}->{self.reader}{where}"


EdgeLike = Edge | str | tuple[str, str] | tuple[str, str, int]
_LABELS = re.compile(r"\s*(?P<sender>[\w.]+)\s*->\s*(?P<reader>[\w.]+)\s*(?:@\s*(?P<pos>\d+))?\s*")


def _written(given: Edge | Sequence[str | int]) -> str:
    """Return the edge as one label, such as `a3.h2->a7.h1.q@16`."""
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
    parallel: tuple[bool, ...]  # per layer: MLP and attention read the same stream

    @property
    def if_all_parallel(self) -> Nodes:
        """The same nodes where every block is parallel, whose edges any model has."""
        return replace(self, parallel=(True,) * self.n_layers)

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """Senders in order: embed, then the heads and the MLP of each layer."""
        senders = [Sender("embed", -1)]
        for layer in range(self.n_layers):
            senders += [Sender("head", layer, head) for head in range(self.n_heads)]
            senders.append(Sender("mlp", layer))
        return tuple(senders)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """Readers in order: per layer q of heads, k and v of key-value heads, the MLP; logits."""
        readers = []
        for layer in range(self.n_layers):
            readers += [Reader("q", layer, head) for head in range(self.n_heads)]
            readers += [Reader("k", layer, head) for head in range(self.n_kv_heads)]
            readers += [Reader("v", layer, head) for head in range(self.n_kv_heads)]
            readers.append(Reader("mlp", layer))
        return (*readers, Reader("logits", self.n_layers))

    def of_layer(self, layer: int) -> slice:
        """Return the indices of the readers of a layer; `n_layers` gives the logits."""
        size = self.n_heads + 2 * self.n_kv_heads + 1
        return slice(layer * size, min((layer + 1) * size, len(self.readers)))

    def heads(self, layer: int) -> slice:
        """Return the indices of the senders that are heads of a layer; its MLP follows them."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    @cached_property
    def readers_of(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the readers of each sender's node: q, k and v of a head; none of embed."""
        found: list[tuple[int, ...]] = [()]
        for node in self.senders[1:]:
            of_layer = self.of_layer(node.layer)
            if node.head is None:
                found.append((of_layer.stop - 1,))
                continue
            key = of_layer.start + self.n_heads + node.head // (self.n_heads // self.n_kv_heads)
            found.append((of_layer.start + node.head, key, key + self.n_kv_heads))
        return tuple(found)

    def entered(self, edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return [sender] whether one of `edges` [sender, reader] enters the sender's node."""
        into = np.asarray(edges.any(axis=0))
        return np.array([into[list(own)].any() for own in self.readers_of])

    def n_seen(self, reader: Reader) -> int:
        """Return the number of senders before `reader`; they are the first ones of `senders`."""
        if reader.kind == "logits":
            return len(self.senders)
        before = 1 + reader.layer * (self.n_heads + 1)
        if reader.kind == "mlp" and not self.parallel[reader.layer]:
            return before + self.n_heads
        return before

    @cached_property
    def possible(self) -> NDArray[np.bool_]:
        """Whether there is an edge, [sender, reader]."""
        seen = np.array([self.n_seen(reader) for reader in self.readers])
        return np.arange(len(self.senders))[:, None] < seen[None, :]

    @property
    def n_edges(self) -> int:
        return int(self.possible.sum())

    def edges_at(self, at: Iterable[NDArray[np.integer]]) -> list[Edge]:
        """Return the edges at indices of senders, of readers, and of positions if there are any."""
        return [
            Edge(self.senders[sender], self.readers[reader], *pos)
            for sender, reader, *pos in zip(*(x.tolist() for x in at), strict=True)
        ]

    def edge(self, given: EdgeLike) -> Edge:
        """Return the edge of `("a3.h2", "a7.h1.q")` or `"a3.h2->a7.h1.q"`.

        With a position: `("a3.h2", "a7.h1.q", 16)` or `"a3.h2->a7.h1.q@16"`.

        Raises:
            PlanError: there is no such sender, reader or edge.
        """
        text = given if isinstance(given, str) else ""
        if isinstance(given, list | tuple | Edge):
            text = _written(given)
        match = _LABELS.fullmatch(text)
        if match is None:
            raise PlanError(
                f"edge {given!r} does not name a sender and a reader; write ('a3.h2', 'a7.h1.q') "
                "or 'a3.h2->a7.h1.q', at position 16 ('a3.h2', 'a7.h1.q', 16)"
            )
        sender, reader = match["sender"], match["reader"]
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
            None if match["pos"] is None else int(match["pos"]),
        )

    def sender_index(self, sender: Sender) -> int:
        """Return the index of `sender` in `senders`."""
        return self._senders[str(sender)]

    @cached_property
    def _senders(self) -> dict[str, int]:
        return {str(sender): i for i, sender in enumerate(self.senders)}

    @cached_property
    def _readers(self) -> dict[str, int]:
        return {str(reader): i for i, reader in enumerate(self.readers)}
