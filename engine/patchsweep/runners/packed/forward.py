"""The packed forward pass: runs the model's own blocks on the packed rows of many patches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from patchsweep_kernels.attention import Rows, prefix_attention
from patchsweep_kernels.scatter import Targets, scatter_targets
from torch import Tensor, nn

from patchsweep.forward.block_args import SharedArguments, first_of, split_hidden, with_first
from patchsweep.forward.capture import watch
from patchsweep.forward.site_locations import SiteLocation
from patchsweep.forward.unwrapped import Attend, HookLocation, UnwrappedModel, attention_settings
from patchsweep.models.arithmetic import last_bit_turned
from patchsweep.runners.packed.graphs import BlockGraphs
from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.runners.packed.tables import (
    BlockTables,
    PackedInput,
    TokenTables,
    make_tables,
    n_units,
)


@torch.no_grad()
def run_packed_batch(
    unwrapped: UnwrappedModel,
    packed: PackedBatch,
    given: PackedInput,
    graphs: BlockGraphs | None = None,
) -> Tensor:
    """Return the final residuals `[token, d_model]` of all rows of `packed`.

    `graphs`: replay blocks of few tokens; None: all blocks run kernel by kernel.

    Row i holds `packed.length - packed.start[i]` tokens, from its start to the last position read;
    the tokens of row i+1 follow.
    """
    tables = make_tables(packed, given, pad_up_to=graphs.most_tokens if graphs else 0)
    return PackedBlocks(unwrapped, packed, given).run_through(tables, graphs)


class PackedBlocks:
    """The packed batch at its current block; hooks and attention functions read it."""

    def __init__(self, unwrapped: UnwrappedModel, packed: PackedBatch, given: PackedInput) -> None:
        self.unwrapped, self.packed, self.given = unwrapped, packed, given
        self.members: dict[str, list[int]] = {}  # site -> indices of the sets that patch it
        for i, values in enumerate(given.patch_values):
            self.members.setdefault(values.point.site.name, []).append(i)
        sites = {values.point.site.name: values.point.site for values in given.patch_values}
        self.stream = [name for name, site in sites.items() if site.in_stream]
        self.tables: TokenTables
        self.rows: Rows
        self.prefix: tuple[Tensor, Tensor] | None = None  # keys and values; None: the base run's
        self._arguments = SharedArguments(given.base.calls)

    def run_through(self, tables: deque[BlockTables], graphs: BlockGraphs | None = None) -> Tensor:
        """Return the final residuals `[token, d_model]`, after all blocks of `tables`."""
        hidden: Tensor | None = None
        with self.hooks():
            while tables:
                block = tables.popleft()
                hidden = self.enter(block, hidden)
                if block.layer < self.unwrapped.n_layers:
                    if graphs is not None and self.takes_graph(graphs, hidden):
                        hidden = self.replay_graph(graphs, hidden)
                    else:
                        hidden = self.replay(hidden)
        assert hidden is not None
        return hidden

    def enter(self, tables: BlockTables, carried: Tensor | None) -> Tensor:
        """Return the tokens `[token, d_model]` at the input of the tables' block, patched."""
        self.tables, self.rows = tables, tables.rows
        hidden = self._carry(tables, None if carried is None else carried.to(tables.device))
        self.write(hidden, *self.stream)
        return hidden

    def _carry(self, tables: BlockTables, carried: Tensor | None) -> Tensor:
        """Return the previous block's tokens, completed by the base run's for new ones."""
        change = tables.change
        if carried is not None and change is None:
            return carried
        base = self.given.base.resid[tables.layer].to(tables.device)
        if carried is None or change is None:
            return base[tables.token_pair, tables.token_pos]
        hidden = base.new_empty(len(tables.token_pos), base.shape[-1])
        if change.carried_from is not None:
            carried = carried.index_select(0, change.carried_from)
        hidden.index_copy_(0, change.carried_to, carried)
        hidden.index_copy_(0, change.new, base[change.new_pair, change.new_pos])
        return hidden

    def replay(self, hidden: Tensor) -> Tensor:
        """Return the output of the tables' block for `hidden` `[token, d_model]`."""
        tables, captured = self.tables, self.given.base.captured
        pair = tables.token_pair
        if captured is not None:
            pair = captured.to(pair.device)[pair]
        call = self._arguments.at(tables.layer, pair, tables.token_pos)
        return call.run(self.unwrapped.blocks[tables.layer], hidden)

    def takes_graph(self, graphs: BlockGraphs, hidden: Tensor) -> bool:
        """Whether the current block does nothing but run, with its inputs on its device."""
        tables = self.tables
        inside = (self.given.patch_values[i].point.site.name for i in tables.writes)
        return (
            tables.padded is not None
            and tables.read is None
            and all(name in self.stream for name in inside)
            and all(x.device == hidden.device for x in self._prefix_at(tables.layer))
            and graphs.takes(tables.layer)
        )

    def replay_graph(self, graphs: BlockGraphs, hidden: Tensor) -> Tensor:
        """Return what `replay` returns, from a graph or from the padded block."""
        layer, padded = self.tables.layer, self.tables.padded
        assert padded is not None
        call = self._arguments.at(layer, padded.token_pair, padded.token_pos)
        return graphs.run(layer, hidden, padded, call, self._prefix_at(layer), self._reading)

    def _prefix_at(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.given.base.keys[layer], self.given.base.values[layer]

    @contextmanager
    def _reading(self, rows: Rows, keys: Tensor, values: Tensor) -> Iterator[None]:
        """Inside, attention reads these rows and this prefix."""
        before = self.rows
        self.rows, self.prefix = rows, (keys, values)
        try:
            yield
        finally:
            self.rows, self.prefix = before, None

    def write(self, x: Tensor, *sites: str) -> None:
        """Write the patches at `sites` into `x` `[.., token, width]`, in place."""
        writes = self.tables.writes
        if not writes:
            return
        for i in (i for site in sites for i in self.members.get(site, ())):
            if i in writes:
                self._write_set(x, i, writes[i])

    def _write_set(self, x: Tensor, i: int, targets: Targets) -> None:
        """Write the patches of set i in one kernel launch."""
        patch_values = self.given.patch_values[i]
        flat = x.view(-1, x.shape[-1])
        if patch_values.layers is None:
            values = last_bit_turned(flat)
        else:
            layer_values = patch_values.layers[self.tables.layer].to(x)
            values = layer_values.reshape(-1, layer_values.shape[-1])
        if targets.head is not None:
            site = patch_values.point.site
            units = n_units(self.given.base, site, self.tables.layer, x.shape[-1])
            flat = flat.view(len(flat), units, -1)
            values = values.view(len(values) * units, -1)
        scatter_targets(flat, values, targets)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Inside, attention runs on packed rows and patches are written at their sites."""
        with ExitStack() as stack:
            locations: list[HookLocation] = []
            for members in self.members.values():
                point = self.given.patch_values[members[0]].point
                for layer, location in enumerate(() if point.site.in_stream else point.points):
                    stack.enter_context(watch(location, self._write_at(layer, point)))
                    locations.append(location)
            self._drop_unread_tokens(stack, locations)
            stack.enter_context(self.unwrapped.attending(self._attention))
            yield

    def _write_at(self, layer: int, point: SiteLocation) -> Any:
        def write(x: Tensor) -> Tensor | None:
            if self.tables.layer != layer:
                return None
            if point.in_place:
                self.write(x, point.site.name)
                return None
            x = x.clone()
            self.write(x, point.site.name)
            return x

        return write

    def _attention(self, layer: int) -> Attend:
        inside = {
            patch_values.point.site.name
            for patch_values in self.given.patch_values
            if patch_values.point.in_attention
        }

        def written(x: Tensor, *sites: str) -> Tensor:
            here = inside.intersection(sites)
            if here:
                x = x.contiguous()
                self.write(x.view(len(x), -1), *here)
            return x

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            settings = attention_settings(module, q.shape[-1], kwargs)
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            q = written(q, "q", "rot_q")
            k = written(k, "k", "rot_k")
            v = written(v, "v")
            z = self.attended(layer, q, k, v, settings)
            return written(z, "pattern", "pattern_cell").unsqueeze(0)

        return attend

    def attended(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """Return attention's output `[token, head, d]` for packed q, k and v."""
        prefix_k, prefix_v = (x.to(q.device) for x in self.prefix or self._prefix_at(layer))
        return prefix_attention(q, k, v, prefix_k, prefix_v, self.rows, **settings)

    def _drop_unread_tokens(self, stack: ExitStack, places: Sequence[HookLocation]) -> None:
        """Make the last block's MLP run only on tokens that are read: gather them, put them back.

        The last block needs the other tokens only for their keys and values. Hooks at `places`,
        registered before, index all tokens: they run before the gather or after the put-back. So
        nothing is gathered if one of `places` is inside the MLP.
        """
        last = self.unwrapped.n_layers - 1
        mlp = self.unwrapped.module_of(getattr(self.unwrapped.bridge.blocks[last], "mlp", None))
        if mlp is None or mlp is self.unwrapped.blocks[last]:
            return
        inside = set(mlp.modules()) - {mlp}
        if any(place.module in inside for place in places):
            return

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            token = self.tables.read
            if token is None:
                return None
            hidden, args, kwargs = split_hidden(args, kwargs)
            self._whole = hidden.shape
            return (hidden[:, token], *args), kwargs

        def put_back(module: nn.Module, args: Any, output: Any) -> Any:
            token = self.tables.read
            if token is None:
                return None
            kept = first_of(output)
            full = kept.new_zeros(self._whole)
            full[:, token] = kept.view(1, len(token), -1)
            return with_first(output, full)

        stack.enter_context(mlp.register_forward_pre_hook(gather, with_kwargs=True))
        stack.enter_context(mlp.register_forward_hook(put_back, prepend=True))
