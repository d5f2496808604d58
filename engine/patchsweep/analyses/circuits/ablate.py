"""Runs a model with everything outside a circuit ablated; a row is one circuit on one pair.

Nodes: z of heads and outputs of MLPs outside the circuit take the ablated value, at every
position. Edges: every reader has an input stream of its own,

    in_v = sum of its senders' writes, with ablated writes for removed edges

so that a sender reaches some readers with its value in this run and others with its ablated
value. If a norm follows attention (Gemma 2 and 3, OLMo 2), it acts on the sum of a layer's heads
as the reader receives them. A circuit of all edges among some nodes then equals the circuit of
these nodes.

All rows run through each block at once, from the first position that can differ.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Reader
from patchsweep.forward.capture import watch
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.trace import Part
from patchsweep.forward.unembed import Unembed
from patchsweep.forward.unwrapped import HookLocation
from patchsweep.spec.sites import SITES

# most bytes of the writes of rows that run together
ROW_BYTES = 512 * 2**20

Kind = Literal["q", "k", "v", "mlp"]
# the map from a head's write to the stream: identity, a factor, or a norm over all heads together
Way = Literal["as it is", "linear", "normed"]


def run_circuits(
    edge_batch: EdgeBatch,
    level: Literal["nodes", "edges"],
    rows: Bool[np.ndarray, "run ..."],
    at: Bool[Tensor, "run pos"] | None = None,
) -> Float[Tensor, "metric pair run"]:
    """Return the metrics of every pair with all outside of each run's nodes or edges ablated.

    `at`: as in `run_nodes`.
    """
    n_pairs, device = edge_batch.base.n_pairs, edge_batch.batch.base.device
    keep = torch.from_numpy(rows).to(device).repeat_interleave(n_pairs, dim=0)
    pair = torch.arange(n_pairs, device=device).repeat(len(rows))
    at = None if at is None else at.repeat_interleave(n_pairs, dim=0)
    run = run_edges if level == "edges" else run_nodes
    return run(edge_batch, keep, pair, at).unflatten(1, (len(rows), n_pairs)).transpose(1, 2)


@torch.no_grad()
def run_nodes(
    edge_batch: EdgeBatch,
    keep: Bool[Tensor, "row node"],
    pair: Int[Tensor, " row"],
    at: Bool[Tensor, "row pos"] | None = None,
) -> Float[Tensor, "metric row"]:
    """Return the metrics of runs on `pair` with all nodes outside `keep` ablated.

    Nodes have the order of `Nodes.senders` without embed, which every circuit keeps. `at` says per
    row at which positions, from the batch's start on; None: at all.
    """
    width = edge_batch.base.resid[0][0, edge_batch.start :].numel()
    # 16 activations of stream width: the stream, q, k, v, z and those inside the MLP
    size = max(1, ROW_BYTES // (4 * 16 * width))
    return _run(edge_batch, _Nodes(edge_batch).run, size, keep, pair, at)


@torch.no_grad()
def run_edges(
    edge_batch: EdgeBatch,
    keep: Bool[Tensor, "row sender reader"],
    pair: Int[Tensor, " row"],
    at: Bool[Tensor, "row pos"] | None = None,
) -> Float[Tensor, "metric row"]:
    """Return the metrics of runs on `pair` with all edges outside `keep` ablated.

    `at`: as in `run_nodes`.
    """
    width = edge_batch.base.resid[0][0].numel()
    nodes = edge_batch.nodes
    n_readers = nodes.n_heads + 2 * nodes.n_kv_heads
    size = max(1, ROW_BYTES // (4 * width * (len(nodes.senders) + 8 * n_readers)))
    ablated = _Ablated(edge_batch)
    return _run(edge_batch, lambda *rows: _Edges(ablated, *rows).run(), size, keep, pair, at)


def _run(
    edge_batch: EdgeBatch,
    run: Callable[[Tensor, Tensor, Tensor | None], Float[Tensor, "row pos d_model"]],
    size: int,
    keep: Tensor,
    pair: Tensor,
    at: Tensor | None,
) -> Float[Tensor, "metric row"]:
    """Run rows, `size` at a time; `run` gives their final residual from `start` on."""
    unembed = Unembed(edge_batch.blocks.unwrapped)
    parts = []
    for first in range(0, len(pair), size):
        rows = slice(first, first + size)
        final = run(keep[rows], pair[rows], None if at is None else at[rows])[:, edge_batch.reads]
        parts.append(edge_batch.metrics_of(unembed, final, pair[rows], all_logits=True))
    return torch.cat(parts, dim=1)


class _Nodes:
    """Runs node circuits of one edge batch."""

    def __init__(self, edge_batch: EdgeBatch) -> None:
        self.edge_batch = edge_batch
        self.z_points = _z_points(edge_batch)
        all_pairs = torch.arange(edge_batch.base.n_pairs, device=edge_batch.batch.base.device)
        # An ablated MLP outputs its source run's value, so that a norm behind it acts as in the
        # source run. The rest of the ablated value is added behind the norm.
        self.beyond = []
        for layer, change in enumerate(edge_batch.changes["mlp_out"]):
            source, base = (
                run.part(layer, "mlp_out") for run in (edge_batch.source, edge_batch.base)
            )
            rest = base + change - source
            self.beyond.append(
                edge_batch.blocks.push(layer, "mlp_out", rest, edge_batch.base, all_pairs)
            )

    def run(
        self,
        keep: Bool[Tensor, "row node"],
        pair: Tensor,
        at: Bool[Tensor, "row pos"] | None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the final residual of every row, from `start` on."""
        edge_batch, start = self.edge_batch, self.edge_batch.start
        n_heads = edge_batch.nodes.n_heads
        by_layer = keep.unflatten(1, (edge_batch.nodes.n_layers, n_heads + 1))
        x = edge_batch.base.resid[0][pair, start:]
        spared = torch.zeros_like(x[..., 0], dtype=torch.bool) if at is None else ~at
        for layer in range(edge_batch.nodes.n_layers):
            heads = by_layer[:, layer, :n_heads].unsqueeze(1) | spared.unsqueeze(-1)
            ablated_mlp = ~(by_layer[:, layer, n_heads, None] | spared)  # [row, pos]
            new_z = (edge_batch.base.z[layer] + edge_batch.changes["z"][layer])[pair, start:]

            def replace_z(z: Tensor, heads: Tensor = heads, new_z: Tensor = new_z) -> Tensor:
                own = z.reshape(*new_z.shape[:2], n_heads, -1)
                mixed = torch.where(heads.unsqueeze(-1), own, new_z.view_as(own))
                return mixed.reshape(z.shape)

            def replace(
                kind: Kind, y: Tensor, layer: int = layer, ablated_mlp: Tensor = ablated_mlp
            ) -> None:
                if kind == "mlp":
                    new = edge_batch.source.part(layer, "mlp")[pair, start:]
                    y.copy_(torch.where(ablated_mlp.unsqueeze(-1), new, y))

            with watch(self.z_points[layer], replace_z):
                x = edge_batch.blocks.run(layer, x, edge_batch.base, pair, start, replace)
            x = x + ablated_mlp.unsqueeze(-1) * self.beyond[layer][pair, start:]
        return x


class _Ablated:
    """The stream of one edge batch with every sender ablated, which all edge circuits share.

    It is a sum of ablated writes, not the base run minus writes: subtraction would leave rounding
    noise where the stream should be zero, and a norm would amplify it.
    """

    def __init__(self, edge_batch: EdgeBatch) -> None:
        self.edge_batch = edge_batch
        self.z_points = _z_points(edge_batch)
        blocks, nodes = edge_batch.blocks, edge_batch.nodes
        base, changes = edge_batch.base, edge_batch.changes
        self.ways = [way_of(edge_batch, layer) for layer in range(nodes.n_layers)]
        self.normed = [layer for layer, way in enumerate(self.ways) if way == "normed"]
        all_pairs = torch.arange(base.n_pairs, device=base.resid[0].device)
        from_start = slice(edge_batch.start, None)
        self.embed = changes["embed"][0][:, from_start].float()  # ablated minus base embeddings
        self.z = [
            (z + dz)[:, from_start].contiguous() for z, dz in zip(base.z, changes["z"], strict=True)
        ]
        self.attn: list[Float[Tensor, "pair pos d_model"]] = []  # per layer, before its norm
        self.mlp: list[Float[Tensor, "pair pos d_model"]] = []  # per layer, as added to the stream
        # the stream before each block, and before its MLP; without attention of `normed` layers
        self.entering = [(base.resid[0] + changes["embed"][0])[:, from_start].float()]
        self.between: list[Float[Tensor, "pair pos d_model"]] = []
        for layer in range(nodes.n_layers):
            self.attn.append(blocks.attention_of(layer, self.z[layer]))
            between = self.entering[-1]
            if layer not in self.normed:
                between = between + self.written(layer, "attn", self.attn[layer], all_pairs)
            mlp = (base.part(layer, "mlp_out") + changes["mlp_out"][layer])[:, from_start]
            self.mlp.append(self.written(layer, "mlp_out", mlp, all_pairs))
            self.between.append(between)
            self.entering.append(between + self.mlp[layer])

    def written(
        self, layer: int, part: Part, value: Float[Tensor, "row pos d_model"], pair: Tensor
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what a part with output `value` adds to the stream; row i belongs to `pair[i]`."""
        base, start = self.edge_batch.base, self.edge_batch.start
        value = value.to(base.resid[0])
        return self.edge_batch.blocks.writes(layer, {part: value}, base, pair, start).float()

    def stream(self, reader: Reader) -> Float[Tensor, "pair pos d_model"]:
        """Return the input of `reader` with every sender ablated, without heads of `normed`."""
        if reader.kind == "mlp" and not self.edge_batch.nodes.parallel[reader.layer]:
            return self.between[reader.layer]
        return self.entering[reader.layer]


class _Edges:
    """Runs rows of edge circuits through the blocks."""

    def __init__(
        self,
        ablated: _Ablated,
        keep: Bool[Tensor, "row sender reader"],
        pair: Tensor,
        at: Bool[Tensor, "row pos"] | None,
    ) -> None:
        self.ablated, self.edge_batch, self.pair = ablated, ablated.edge_batch, pair
        self.keep, self.at = keep.to(ablated.embed), at
        # per sender its write in this row minus its ablated write
        n_senders = len(self.edge_batch.nodes.senders)
        self.more = ablated.embed.new_zeros(len(pair), n_senders, *ablated.embed.shape[1:])
        self.more[:, 0] = -ablated.embed[pair]
        # likewise before the norm, for heads that share one
        self.gained: dict[int, Float[Tensor, "row head pos d_model"]] = {}

    def run(self) -> Float[Tensor, "row pos d_model"]:
        """Return the final residual of every row, the input of the logits, from `start` on."""
        for layer in range(self.edge_batch.nodes.n_layers):
            self._attention(layer)
            self._mlp(layer)
        last = len(self.edge_batch.nodes.readers) - 1
        return self._seen(slice(last, last + 1))[:, 0]

    def _seen(self, readers: slice) -> Float[Tensor, "row reader pos d_model"]:
        """Return the input stream of each of `readers`, which belong to one layer."""
        edge_batch, ablated, pair = self.edge_batch, self.ablated, self.pair
        reader = edge_batch.nodes.readers[readers.start]
        n_seen = edge_batch.nodes.n_seen(reader)
        removed = ablated.stream(reader)
        kept_writes = self._kept(slice(0, n_seen), readers, self.more[:, :n_seen])
        streams = removed[pair].unsqueeze(1) + kept_writes
        rows = pair.repeat_interleave(streams.shape[1])
        for layer in ablated.normed:
            heads = edge_batch.nodes.heads(layer)
            if heads.stop > n_seen:
                break
            head_writes = self._kept(heads, readers, self.gained[layer])
            attn = ablated.attn[layer][pair].unsqueeze(1) + head_writes
            streams += ablated.written(layer, "attn", attn.flatten(0, 1), rows).view_as(streams)
        return streams.to(edge_batch.base.resid[0])

    def _kept(
        self, senders: slice, readers: slice, writes: Float[Tensor, "row sender pos d"]
    ) -> Float[Tensor, "row reader pos d"]:
        """Return per reader the sum of the writes whose edges are kept; all where none acts."""
        flat = self.keep[:, senders, readers].transpose(1, 2) @ writes.flatten(2)
        kept = flat.unflatten(-1, writes.shape[2:])
        if self.at is None:
            return kept
        everything = writes.sum(dim=1, keepdim=True)
        return torch.where(self.at[:, None, :, None], kept, everything)

    def _attention(self, layer: int) -> None:
        """Run attention of `layer` with q, k and v each from its reader's own stream."""
        edge_batch, pair, start = self.edge_batch, self.pair, self.edge_batch.start
        n_heads, n_kv = edge_batch.nodes.n_heads, edge_batch.nodes.n_kv_heads
        readers = edge_batch.nodes.of_layer(layer)
        n_readers = n_heads + 2 * n_kv
        x = self._seen(slice(readers.start, readers.start + n_readers))
        rows = pair.repeat_interleave(n_readers)
        qkv = edge_batch.blocks.qkv_of(layer, x.flatten(0, 1), edge_batch.base, rows, start)
        # reader i is head i among those of its kind
        reader_values = {}
        first = 0
        for kind, heads_of_kind in zip(("q", "k", "v"), qkv, strict=True):
            head = torch.arange(heads_of_kind.shape[1], device=x.device)
            reader_values[kind] = heads_of_kind.unflatten(0, (len(pair), n_readers))[
                :, first + head, head
            ]
            first += len(head)
        change = self._z(layer, reader_values) - self.ablated.z[layer][pair]
        gained = edge_batch.blocks.head_writes(layer, change, n_heads)
        way = self.ablated.ways[layer]
        if way == "normed":
            self.gained[layer] = gained.transpose(0, 1).float()
            return
        if way == "linear":
            flat, rows = gained.flatten(0, 1), pair.repeat(n_heads)
            written = self.ablated.written(layer, "attn", flat, rows)
            gained = (written - self.ablated.written(layer, "attn", 0 * flat, rows)).view_as(gained)
        self.more[:, edge_batch.nodes.heads(layer)] = gained.transpose(0, 1).float()

    def _z(self, layer: int, own: dict[str, Tensor]) -> Float[Tensor, "row pos width"]:
        """Return z of attention with these q, k and v `[row, head, pos, d]`."""
        edge_batch, pair, start = self.edge_batch, self.pair, self.edge_batch.start
        x = edge_batch.base.resid[layer][pair, start:]
        captured: list[Tensor] = []

        def stop(z: Tensor) -> None:
            captured.append(z.reshape(*x.shape[:2], -1))
            raise _Seen

        def replace(kind: Kind, value: Tensor) -> None:
            value.copy_(own[kind])

        with watch(self.ablated.z_points[layer], stop), suppress(_Seen):
            edge_batch.blocks.run(layer, x, edge_batch.base, pair, start, replace)
        return captured[0]

    def _mlp(self, layer: int) -> None:
        """Run the MLP of `layer` on its input stream."""
        edge_batch, pair = self.edge_batch, self.pair
        reader = edge_batch.nodes.of_layer(layer).stop - 1
        (stream,) = self._seen(slice(reader, reader + 1)).unbind(1)
        # the stream already holds attention's part as this MLP receives it
        no_attention: dict[Part, Tensor] = dict.fromkeys(
            ("attn", "attn_out"), torch.zeros_like(stream)
        )
        y = edge_batch.blocks.mlp_of(
            layer, stream, edge_batch.base, pair, edge_batch.start, held=no_attention
        )
        written = self.ablated.written(layer, "mlp", y, pair)
        self.more[:, edge_batch.nodes.heads(layer).stop] = written - self.ablated.mlp[layer][pair]


class _Seen(Exception):
    """Ends a block's run early, once z is captured."""


def _z_points(edge_batch: EdgeBatch) -> tuple[HookLocation, ...]:
    return resolve_site(edge_batch.blocks.unwrapped, SITES["z"]).points


def way_of(edge_batch: EdgeBatch, layer: int) -> Way:
    """Return how the heads' writes reach the stream, measured with a probe."""
    # a rolled output, since a norm is invariant to multiples of the output itself
    probe = edge_batch.base.part(layer, "attn")[:1].roll(1, dims=-1)
    first = torch.zeros(1, dtype=torch.long, device=probe.device)
    once, twice = (
        edge_batch.blocks.exact_head_writes(layer, factor * probe, edge_batch.base, first)
        for factor in (1, 2)
    )
    if torch.equal(once, probe):
        return "as it is"
    return "linear" if torch.equal(2 * once, twice) else "normed"
