"""The packed forward pass: runs the model's own blocks on the packed rows of many patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from patchsweep_kernels.attention import Rows, prefix_attention
from patchsweep_kernels.scatter import scatter_patch
from torch import Tensor, nn

from patchsweep.forward.block_args import first_of, split_hidden, with_first
from patchsweep.forward.capture import ActivationCache, watch
from patchsweep.forward.site_locations import SiteLocation
from patchsweep.forward.unwrapped import Attend, HookLocation, UnwrappedModel, attention_settings
from patchsweep.models.arithmetic import last_bit_turned
from patchsweep.runners.packed.packing import PackedTokens, Packing, pack
from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.spec.plan import Column, Ints
from patchsweep.spec.sites import Site


@dataclass(frozen=True)
class PatchValues:
    """The patch values of one set, and where they are written."""

    point: SiteLocation
    # values [pair, pos, width] per layer at which they are written; None: identity patches, which
    # flip the last bit
    layers: Sequence[Tensor] | None
    # [patch] row of its one vector in the values, which are [row, width] then; None: see `layers`
    row: Column | Ints | None = None


@dataclass(frozen=True)
class PackedInput:
    """The inputs of a packed batch besides the model, for prompts of one length."""

    base: ActivationCache
    patch_values: Sequence[PatchValues]  # for each of the packed batch's sets
    local: dict[int, int]  # pair of the plan -> row of `base` and of the values


@torch.no_grad()
def run_packed_batch(unwrapped: UnwrappedModel, packed: PackedBatch, given: PackedInput) -> Tensor:
    """Return the final residuals `[token, d_model]` of all rows of `packed`.

    Row i holds `packed.length - packed.start[i]` tokens, from its start to the last position read;
    the tokens of row i+1 follow.
    """
    current = PackedBlocks(unwrapped, packed, given)
    hidden: Tensor | None = None
    with ExitStack() as stack:
        stack.enter_context(current.hooks())
        for packing in pack(packed):
            hidden = current.enter(packing, hidden)
            if packing.layer < unwrapped.n_layers:
                hidden = current.replay(hidden)
    assert hidden is not None
    return hidden


class PackedBlocks:
    """The packed batch at its current block; hooks and attention functions read it."""

    def __init__(self, unwrapped: UnwrappedModel, packed: PackedBatch, given: PackedInput) -> None:
        self.unwrapped, self.packed, self.given = unwrapped, packed, given
        self.device = given.base.devices[0]  # of the current block
        self.local = np.array([given.local.get(p, -1) for p in range(packed.n_pairs)])
        self.members: dict[str, list[int]] = {}  # site -> indices of the sets that patch it
        for i, values in enumerate(given.patch_values):
            self.members.setdefault(values.point.site.name, []).append(i)
        sites = {values.point.site.name: values.point.site for values in given.patch_values}
        self.stream = [name for name, site in sites.items() if site.in_stream]
        self.packing: PackedTokens
        self.rows: Rows
        self.token_pair: Tensor
        self.token_pos: Tensor

    def enter(self, packing: Packing, carried: Tensor | None) -> Tensor:
        """Return the tokens `[token, d_model]` at the input of the packing's block, patched."""
        device = self.given.base.devices[packing.layer]
        if carried is None or not packing.same or device != self.device:
            self.device = device
            self.token_pair = self._index(self.local[packing.token_pair])
            self.token_pos = self._index(packing.token_pos)
            self.rows = Rows(
                offsets=torch.from_numpy(packing.offsets),
                pair=torch.from_numpy(self.local[packing.pair]),
                start=torch.from_numpy(packing.start),
            )
        self.packing = packing
        hidden = self._carry(packing, None if carried is None else carried.to(device))
        self.write(hidden, *self.stream)
        return hidden

    def _carry(self, packing: Packing, carried: Tensor | None) -> Tensor:
        """Return the previous block's tokens, completed by the base run's for new ones."""
        if carried is not None and packing.same:
            return carried
        base = self.given.base.resid[packing.layer].to(self.device)
        if carried is None:
            return base[self.token_pair, self.token_pos]
        hidden = base.new_empty(packing.n_tokens, base.shape[-1])
        if len(packing.carried_from) < len(carried):
            carried = carried.index_select(0, self._index(packing.carried_from))
        hidden.index_copy_(0, self._index(packing.carried_to), carried)
        fresh = np.ones(packing.n_tokens, dtype=bool)
        fresh[packing.carried_to] = False
        new = self._index(np.flatnonzero(fresh))
        hidden.index_copy_(0, new, base[self.token_pair[new], self.token_pos[new]])
        return hidden

    def replay(self, hidden: Tensor) -> Tensor:
        """Return the output of the packing's block for `hidden` `[token, d_model]`."""
        layer = self.packing.layer
        block_args = self.given.base.calls[layer].at(self.token_pair, self.token_pos)
        output = self.unwrapped.blocks[layer](
            hidden.unsqueeze(0), *block_args.args, **block_args.kwargs
        )
        return first_of(output).squeeze(0)

    def write(self, x: Tensor, *sites: str) -> None:
        """Write the patches at `sites` into `x` `[.., token, width]`, in place."""
        packing = self.packing
        if not len(packing.write_token):
            return
        for i in (i for site in sites for i in self.members.get(site, ())):
            of_set = self.packed.which[packing.write_row] == i
            if of_set.any():
                self._write_set(x, i, packing.write_token[of_set], packing.write_row[of_set])

    def _write_set(self, x: Tensor, i: int, token: Ints, row: Ints) -> None:
        """Write the patches of set i in one kernel launch."""
        packed, patch_values = self.packed, self.given.patch_values[i]
        plan, patch = packed.sets[i].plan, packed.patch[row]
        flat = x.view(-1, x.shape[-1])
        if patch_values.layers is None:
            values, source = last_bit_turned(flat), token
        else:
            layer_values = patch_values.layers[self.packing.layer].to(x)
            length, width = layer_values.shape[-2:]
            values = layer_values.reshape(-1, width)
            if patch_values.row is None:
                source = self.local[packed.pair[row]] * length + self.packing.token_pos[token]
            else:
                source = patch_values.row[patch]
        units, width = plan.axes.units, x.shape[-1]
        if units is None:
            scatter_patch(flat, values, _table(token), source=_table(source))
            return
        n_units = self._n_units(plan.site, width)
        unit_sets = plan.unit_set[patch]
        sizes = np.array([len(unit) for unit in units])
        flat_units = np.concatenate([np.array(unit) for unit in units])
        first = np.concatenate([[0], np.cumsum(sizes)])
        repeat = np.repeat(np.arange(len(unit_sets)), sizes[unit_sets])
        within = np.arange(len(repeat)) - np.repeat(
            np.cumsum(sizes[unit_sets]) - sizes[unit_sets], sizes[unit_sets]
        )
        unit = flat_units[first[unit_sets[repeat]] + within]
        scatter_patch(
            flat.view(len(flat), n_units, -1),
            values.view(len(values) * n_units, -1),
            _table(token[repeat]),
            source=_table(source[repeat] * n_units + unit),
            head=_table(unit),
        )

    def _n_units(self, site: Site, width: int) -> int:
        """Return the number of heads (or neurons) in one vector of `site`."""
        base, layer = self.given.base, self.packing.layer
        if site.unit == "head":  # a query is as wide as a key, and z as a value
            like = base.keys if site.side == "query" else base.values
            return width // like[layer].shape[-1]
        if site.unit == "kv_head":
            return base.keys[layer].shape[1]
        return width

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
            self.unwrapped.attend_with(self._attention)
            stack.callback(self.unwrapped.attend_with, None)
            yield

    def _write_at(self, layer: int, point: SiteLocation) -> Any:
        def write(x: Tensor) -> Tensor | None:
            if self.packing.layer != layer:
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
        base = self.given.base
        prefix_k, prefix_v = (x[layer].to(q.device) for x in (base.keys, base.values))
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
        reads = self.packed.reads

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.packing.layer != last:
                return None
            hidden, args, kwargs = split_hidden(args, kwargs)
            packing = self.packing
            read = np.flatnonzero(reads[packing.token_pair, packing.token_pos])
            # of adaptive rows none may be read; modules need not take zero tokens
            token = self._index(read if len(read) else np.zeros(1, np.int64))
            self._kept = (hidden.shape, token)
            return (hidden[:, token], *args), kwargs

        def put_back(module: nn.Module, args: Any, output: Any) -> Any:
            if self.packing.layer != last:
                return None
            shape, token = self._kept
            kept = first_of(output)
            full = kept.new_zeros(shape)
            full[:, token] = kept.view(1, len(token), -1)
            return with_first(output, full)

        stack.callback(mlp.register_forward_pre_hook(gather, with_kwargs=True).remove)
        stack.callback(mlp.register_forward_hook(put_back, prepend=True).remove)

    def _index(self, array: Any) -> Tensor:
        return _table(array).to(self.device)


def _table(array: Any) -> Tensor:
    """Return `array` as a CPU tensor, which `scatter_patch` checks without waiting for the GPU."""
    return torch.from_numpy(np.ascontiguousarray(array))
