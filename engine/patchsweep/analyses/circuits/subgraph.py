"""Runs a circuit of edges with some edges into one reader removed: many such runs together.

A circuit is pruned from the logits down: edges into later readers are decided, those into earlier
ones all there. So everything before the reader at hand is as in the base run, and of what comes
after it only nodes run that its output reaches, over edges of the circuit, and that reach the
logits. Of each reader only its own input stream is computed,

    input = input in the circuit so far + sum over senders of kept edges of their writes' changes,

and a node's change is that of its output from the circuit so far. Nodes that reach no logits need
no run: whatever they read, no metric changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.analyses.circuits.ablate import ROW_BYTES, Way, run_circuits, way_of
from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.exact import MAX_TOKENS
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.selection import reaching
from patchsweep.forward.trace import Part, attend_rows
from patchsweep.forward.unembed import Unembed

# a circuit's edges; the last axis has one entry, or one for each position up to the last one read
Kept = Bool[np.ndarray, "sender reader pos"]
# rows of edges into one reader
Masks = Bool[np.ndarray, "row sender pos"]


def runs_of(edge_batch: EdgeBatch) -> DenseRuns | SparseRuns:
    """Return runs of a batch: of what changes alone, if heads write one by one."""
    ways = [way_of(edge_batch, layer) for layer in range(edge_batch.nodes.n_layers)]
    return DenseRuns(edge_batch) if "normed" in ways else SparseRuns(edge_batch, ways)


def reached(nodes: Nodes, kept: Kept, reader: int) -> NDArray[np.bool_]:
    """Return [sender] whether a sender changes with the input of `reader`, over edges `kept`."""
    edge, changed = np.asarray(kept.any(axis=-1)), np.zeros(len(nodes.senders), dtype=bool)
    for sender in range(1, len(nodes.senders)):
        own = nodes.readers_of[sender]
        changed[sender] = reader in own or edge[changed][:, list(own)].any()
    return changed


class DenseRuns:
    """Runs every node of every row: for models with a norm after attention, without positions."""

    def __init__(self, edge_batch: EdgeBatch) -> None:
        self.edge_batch = edge_batch

    def most_rows(self, kept: Kept, reader: int) -> int:
        """See `SparseRuns`."""
        return 32  # `run_circuits` divides them by memory

    def run(self, kept: Kept, reader: int, masks: Masks) -> Float[Tensor, "metric pair row"]:
        """See `SparseRuns`."""
        rows = np.repeat(kept[None, :, :, 0], len(masks), axis=0)
        rows[:, :, reader] = masks[:, :, 0]
        return run_circuits(self.edge_batch, "edges", rows)

    def commit(self, kept: Kept, reader: int) -> None:
        """See `SparseRuns`; every row runs all there is."""


class SparseRuns:
    """Runs the nodes that change alone, in a batch of pairs that is pruned reader by reader."""

    def __init__(self, edge_batch: EdgeBatch, ways: Sequence[Way]) -> None:
        self.edge_batch, self.nodes, self.ways = edge_batch, edge_batch.nodes, ways
        base, start = edge_batch.base, edge_batch.start
        self.late = slice(start, edge_batch.batch.reads[-1] + 1)
        self.n_pos = self.late.stop - start
        self.removed = edge_batch.writes()[:, :, : self.n_pos]  # ablated minus base
        self.unembed = Unembed(edge_batch.blocks.unwrapped)
        self.pairs = torch.arange(base.n_pairs, device=base.resid[0].device)
        # of the circuit so far: readers' input streams, and what nodes have put out
        self.inputs: dict[int, Float[Tensor, "pair pos d_model"]] = {}
        self.qkv = [list(t) for t in zip(base.q, base.k, base.v, strict=True)]
        self.z = [z[:, self.late].unflatten(-1, (self.nodes.n_heads, -1)) for z in base.z]
        self.mlp: dict[int, Float[Tensor, "pair pos d_model"]] = {}  # as added to the stream

    def most_rows(self, kept: Kept, reader: int) -> int:
        """Return how many rows fit one call of `run`."""
        row = len(self.pairs) * self.n_pos
        width = 4 * self.removed.shape[-1] * (8 + int(reached(self.nodes, kept, reader).sum()))
        return max(1, min(MAX_TOKENS, ROW_BYTES // width) // row)

    @torch.no_grad()
    def run(self, kept: Kept, reader: int, masks: Masks) -> Float[Tensor, "metric pair row"]:
        """Return metrics of runs of `kept` with the edges `masks` into `reader` instead."""
        rows = _Rows(self, kept, reader, masks)
        final = rows.run()[:, self.edge_batch.reads].to(self.edge_batch.base.resid[0])
        found = self.edge_batch.metrics_of(self.unembed, final, rows.pair)
        return found.unflatten(1, (len(masks), -1)).transpose(1, 2)

    @torch.no_grad()
    def commit(self, kept: Kept, reader: int) -> None:
        """Take `kept`, from which edges into `reader` were removed, as the circuit so far."""
        rows = _Rows(self, kept, reader, kept[None, :, reader])
        rows.run()
        rows.keep()

    def weights(self, edges: Bool[np.ndarray, "... pos"]) -> Float[Tensor, "... late"]:
        """Return edges as zeros and ones, without the positions before `start`."""
        late = edges if edges.shape[-1] == 1 else edges[..., self.late]
        return torch.from_numpy(np.ascontiguousarray(late)).to(self.removed)

    def input(self, reader: int) -> Float[Tensor, "pair pos d_model"]:
        """Return the input stream of a reader in the circuit so far."""
        if reader not in self.inputs:
            self.inputs[reader] = self.whole_input(reader)
        return self.inputs[reader]

    def whole_input(self, reader: int) -> Float[Tensor, "pair pos d_model"]:
        """Return the input stream of a reader in the base run; an MLP's holds attention."""
        node, base = self.nodes.readers[reader], self.edge_batch.base
        x = base.resid[node.layer][:, self.late].float()
        if node.kind == "mlp" and not self.nodes.parallel[node.layer]:
            attn = base.part(node.layer, "attn")[:, self.late]
            x = x + self.added(node.layer, "attn", attn, self.pairs)
        return x

    def mlp_of(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """Return what an MLP adds to the stream in the circuit so far."""
        if layer not in self.mlp:
            out = self.edge_batch.base.part(layer, "mlp")[:, self.late]
            self.mlp[layer] = self.added(layer, "mlp", out, self.pairs)
        return self.mlp[layer]

    def added(
        self, layer: int, part: Part, value: Float[Tensor, "row pos d_model"], pair: Tensor
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what a part with output `value` adds to the stream, fp32."""
        blocks, base = self.edge_batch.blocks, self.edge_batch.base
        given: dict[Part, Tensor] = {part: value.to(base.resid[0])}
        return blocks.writes(layer, given, base, pair, self.edge_batch.start).float()


class _Rows:
    """Rows (mask, pair) of one circuit with other edges into one reader."""

    def __init__(self, state: SparseRuns, kept: Kept, reader: int, masks: Masks) -> None:
        self.state, self.reader, self.nodes = state, reader, state.nodes
        self.pair = state.pairs.repeat(len(masks))
        self.kept = state.weights(kept)
        useful = self.useful = reaching(self.nodes, np.asarray(kept.any(axis=-1)))
        changed = reached(self.nodes, kept, reader)
        # senders that run, in order
        self.senders = [
            sender
            for sender in np.flatnonzero(changed).tolist()
            if (kept[sender].any(axis=-1) & useful).any()
        ]
        gone = state.weights(~masks & self.nodes.possible[None, :, reader, None])
        if gone.shape[2] == 1:
            change = torch.einsum("rs,nspd->rnpd", gone[..., 0], state.removed)
        else:
            change = torch.einsum("rsp,nspd->rnpd", gone, state.removed)
        self.entering = (state.whole_input(reader) + change).flatten(0, 1)
        self.moved = self.entering.new_empty(len(self.senders), *self.entering.shape)
        self.n_moved = 0
        self.new: dict[tuple[int, int, int], Tensor] = {}  # (layer, 0 to 3: q k v z, head)
        self.mlps: dict[int, Tensor] = {}

    def run(self) -> Float[Tensor, "row pos d_model"]:
        """Return the final residual from `start` to the last position read."""
        layers = sorted({self.nodes.senders[sender].layer for sender in self.senders})
        for layer in layers:
            of_layer = [s for s in self.senders if self.nodes.senders[s].layer == layer]
            heads = [s for s in of_layer if self.nodes.senders[s].kind == "head"]
            if heads:
                self._attention(layer, heads)
            if len(heads) < len(of_layer):
                self._mlp(layer)
        last = len(self.nodes.readers) - 1
        return self._seen([last]).get(last, self.state.input(last)[self.pair])

    def keep(self) -> None:
        """Make these rows, one of each pair, the circuit so far."""
        state = self.state
        seen = self._seen(np.flatnonzero(self.useful).tolist())
        state.inputs.update(seen)
        state.inputs[self.reader] = self.entering
        for (layer, kind, head), value in self.new.items():
            if kind == 3:
                state.z[layer] = state.z[layer].clone()
                state.z[layer][:, :, head] = value
            else:
                state.qkv[layer][kind] = state.qkv[layer][kind].clone()
                state.qkv[layer][kind][:, head, state.late] = value
        state.mlp.update(self.mlps)

    def _seen(self, readers: Sequence[int]) -> dict[int, Float[Tensor, "row pos d_model"]]:
        """Return the inputs of those of `readers` that change."""
        found = {}
        if self.reader in readers:
            found[self.reader] = self.entering
        senders, moved = self.senders[: self.n_moved], self.moved[: self.n_moved]
        weights = self.kept[senders]
        others = [r for r in readers if r != self.reader and bool(weights[:, r].any())]
        if not others:
            return found
        chosen = weights[:, others]
        if chosen.shape[2] == 1:
            change = (chosen[..., 0].T @ moved.flatten(1)).unflatten(1, moved.shape[1:])
        else:
            change = torch.einsum("sop,srpd->orpd", chosen, moved)
        for reader, more in zip(others, change, strict=True):
            found[reader] = self.state.input(reader)[self.pair] + more
        return found

    def _attention(self, layer: int, heads: Sequence[int]) -> None:
        """Run heads of a layer."""
        state, nodes, pair = self.state, self.nodes, self.pair
        edge_batch, base = state.edge_batch, state.edge_batch.base
        own = dict.fromkeys(r for sender in heads for r in nodes.readers_of[sender])
        seen = self._seen([*own])
        if seen:
            x = torch.cat([*seen.values()]).to(base.resid[0])
            rows = pair.repeat(len(seen))
            qkv = edge_batch.blocks.qkv_of(layer, x, base, rows, edge_batch.start)
            for i, reader in enumerate(seen):
                node = nodes.readers[reader]
                kind, head = "qkv".index(node.kind), node.head or 0
                part = slice(i * len(pair), (i + 1) * len(pair))
                self.new[layer, kind, head] = qkv[kind][part, head]
        group = nodes.n_heads // nodes.n_kv_heads
        z = state.z[layer]
        alone = z.new_zeros(len(heads), len(pair), *z.shape[1:])
        for i, sender in enumerate(heads):
            head = nodes.senders[sender].head or 0
            parts: list[Tensor] = []
            for kind, unit in enumerate((head, head // group, head // group)):
                value = self.new.get((layer, kind, unit))
                if value is None:
                    value = state.qkv[layer][kind][pair, unit, state.late]
                parts.append(value.unsqueeze(1))
            q, k, v = parts
            found = attend_rows(base, layer, q, k, v, pair, edge_batch.start, head).squeeze(2)
            alone[i, :, :, head] = found - z[pair, :, head]
            self.new[layer, 3, head] = found
        flat = alone.flatten(0, 1).flatten(2)
        nothing = torch.zeros_like(flat[:1, :1])
        gained = edge_batch.blocks.attention_of(layer, flat)
        gained = gained - edge_batch.blocks.attention_of(layer, nothing)
        if state.ways[layer] == "linear":
            rows = pair.repeat(len(heads))
            without = state.added(layer, "attn", 0 * gained, rows)
            gained = state.added(layer, "attn", gained, rows) - without
        self._move(gained.float().unflatten(0, (len(heads), -1)))

    def _mlp(self, layer: int) -> None:
        """Run the MLP of a layer."""
        state, base = self.state, self.state.edge_batch.base
        (x,) = self._seen([self.nodes.of_layer(layer).stop - 1]).values()
        x = x.to(base.resid[0])
        nothing = torch.zeros_like(x)
        out = state.edge_batch.blocks.mlp_of(
            layer, x, base, self.pair, state.edge_batch.start,
            held={"attn": nothing, "attn_out": nothing},
        )  # fmt: skip
        self.mlps[layer] = state.added(layer, "mlp", out, self.pair)
        self._move((self.mlps[layer] - state.mlp_of(layer)[self.pair]).unsqueeze(0))

    def _move(self, changes: Float[Tensor, "sender row pos d_model"]) -> None:
        self.moved[self.n_moved : self.n_moved + len(changes)] = changes
        self.n_moved += len(changes)
