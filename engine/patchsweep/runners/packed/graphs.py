"""CUDA graphs: a block whose launches take longer than its products is replayed with one launch.

A graph reads and writes fixed addresses. So the tokens of a block are padded to one of a few sizes,
its inputs are copied to buffers that stay, and its output is written over its input: while tokens
stay, the next block finds it there. Values do not depend on which visits were replayed, because the
others run the same padded block without a graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from patchsweep_kernels.attention import Rows
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from patchsweep.forward.block_args import BlockArgs, first_of
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.models.heartbeat import beat
from patchsweep.models.offload import device_of
from patchsweep.runners.packed.budget import launch_bound_tokens
from patchsweep.runners.packed.tables import Padded

log = logging.getLogger("patchsweep")
# most tokens of a padded block: graphs keep the memory of their activations
MOST_TOKENS = 4096
# A block is captured when it is visited so often in one size; capturing takes as long as some
# visits. An assumption, not a measurement.
VISITS = 8
# most graphs of a runner; what is visited later runs without
MOST_GRAPHS = 1024


def available(device: torch.device) -> bool:
    """Whether graphs can be captured on `device`."""
    return device.type == "cuda" and torch.backends.cuda.is_built()


@dataclass(eq=False)
class _Place:
    """A buffer that stays where it is, and which tensor was copied there last."""

    buffer: Tensor
    _held: Callable[[], Tensor | None] = lambda: None

    def put(self, x: Tensor) -> Tensor:
        """Return the buffer, which holds the values of `x`; nothing writes into `x` later."""
        if self._held() is not x:
            self.buffer.copy_(x)
            self._held = ref(x)
        return self.buffer


@dataclass(eq=False)
class BlockGraphs:
    """The graphs of a model's blocks, and the buffers that they read."""

    unwrapped: UnwrappedModel
    most_tokens: int  # of a padded block
    _places: dict[Hashable, _Place] = field(default_factory=dict)
    _rows: dict[Hashable, Rows] = field(default_factory=dict)
    _visits: Counter[Hashable] = field(default_factory=Counter)
    _graphs: dict[Hashable, Any] = field(default_factory=dict)  # torch.cuda.CUDAGraph each
    _refused: set[int] = field(default_factory=set)  # blocks that cannot be captured
    _pools: dict[torch.device, Any] = field(default_factory=dict)  # memory of the graphs
    _output: Tensor | None = None  # of the last padded block, in the buffer of `hidden`

    @classmethod
    def of(cls, unwrapped: UnwrappedModel) -> BlockGraphs | None:
        """Return the graphs of a model that is on a GPU; None for another."""
        if not available(device_of(unwrapped.bridge)):
            return None
        bound = launch_bound_tokens(unwrapped.bridge, unwrapped.dtype)
        return cls(unwrapped, min(MOST_TOKENS, bound))

    def takes(self, layer: int) -> bool:
        """Whether block `layer` may run padded: it keeps its weights where they are."""
        return layer not in self._refused and not self.unwrapped.is_away(
            self.unwrapped.blocks[layer]
        )

    def run(
        self,
        layer: int,
        hidden: Tensor,
        padded: Padded,
        call: BlockArgs,
        prefix: tuple[Tensor, Tensor],
        reading: Callable[[Rows, Tensor, Tensor], AbstractContextManager[None]],
    ) -> Tensor:
        """Return the output `[token, d_model]` of a block that does nothing but run.

        It is a view of a buffer, which the next padded block overwrites. `call`: the block's
        arguments for the padded tokens. `prefix`: keys and values of the base run. `reading`: makes
        attention read other rows and another prefix.
        """
        leaves, structure = tree_flatten((call.args, call.kwargs))
        keys, values = (self._place((i, layer), x).put(x) for i, x in enumerate(prefix))
        rows = self._rows_of(padded, keys)
        arguments = [
            self._place(("argument", i), x).put(x) if isinstance(x, Tensor) else x
            for i, x in enumerate(leaves)
        ]
        args, kwargs = tree_unflatten(arguments, structure)
        x = self._padded(hidden, padded)
        key = (layer, len(x), keys.shape, tuple(map(_kind, leaves)))

        def block() -> None:
            output = self.unwrapped.blocks[layer](x.unsqueeze(0), *args, **kwargs)
            x.copy_(first_of(output).squeeze(0))

        with reading(rows, keys, values):
            if key in self._graphs:
                self._graphs[key].replay()
                beat(len(hidden))
            else:
                self._visit(key, layer, x, block)
        self._output = x[: len(hidden)]
        return self._output

    def _place(self, name: Hashable, like: Tensor) -> _Place:
        key = (name, like.shape, like.dtype, like.device)
        if key not in self._places:
            self._places[key] = _Place(
                torch.empty_like(like, memory_format=torch.contiguous_format)
            )
        return self._places[key]

    def _padded(self, hidden: Tensor, padded: Padded) -> Tensor:
        """Return the buffer of `hidden`, with zeros after it."""
        n, shape = len(hidden), (len(padded.token_pos), hidden.shape[1])
        key = ("hidden", shape, hidden.dtype, hidden.device)
        if key not in self._places:
            self._places[key] = _Place(hidden.new_zeros(shape))
        buffer = self._places[key].buffer
        if hidden is not self._output:
            buffer[:n].copy_(hidden)
            buffer[n:].zero_()  # what was there would grow from visit to visit
        return buffer

    def _rows_of(self, padded: Padded, keys: Tensor) -> Rows:
        """Return rows whose tables are in buffers; on a CPU, which has no graphs, the rows."""
        if not padded.blocks:
            return padded.rows
        n_pairs, _, n_pos, _ = keys.shape
        tokens = self._place("tokens", padded.tokens).put(padded.tokens)
        key = (tokens.shape, tokens.device, n_pairs, n_pos)
        if key not in self._rows:
            # as deep and long as any that come, so that what is decided by it holds for all
            one = torch.tensor([0], device="cpu")
            self._rows[key] = Rows(
                one.new_tensor([0, tokens.shape[1]]), one + n_pairs - 1, one + n_pos
            )
        for size, table in padded.blocks.items():
            self._rows[key].keep_tables(size, tokens, self._place(size, table).put(table))
        return self._rows[key]

    def _visit(self, key: Hashable, layer: int, x: Tensor, block: Callable[[], None]) -> None:
        """Run a block without a graph; capture it for later visits if it comes often."""
        self._visits[key] += 1
        last = self._visits[key] == VISITS and available(x.device)
        before = x.clone() if last and len(self._graphs) < MOST_GRAPHS else None
        block()
        if before is None:
            return
        expected = x.clone()
        try:
            with torch.cuda.device(x.device):
                graph = self._captured(x.device, block)
                x.copy_(before)
                graph.replay()
            if not torch.equal(x, expected):
                raise RuntimeError("a replay gives other values")
            self._graphs[key] = graph
        except RuntimeError as error:
            if not self._refused:
                log.warning(
                    "block %d runs without CUDA graphs, kernel by kernel: %s",
                    layer,
                    str(error).partition("\n")[0],
                )
            self._refused.add(layer)
        x.copy_(expected)

    def _captured(self, device: torch.device, block: Callable[[], None]) -> Any:
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pools[device], capture_error_mode="thread_local"):
            block()
        return graph


def _kind(argument: Any) -> Hashable:
    """Return what a graph knows of an argument: for a tensor its shape, else its value."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype
    kind: Hashable = argument if isinstance(argument, Hashable) else str(type(argument))
    return kind
