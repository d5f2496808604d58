"""The packed runner: replay the model's own blocks on the packed rows of many patches."""

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
from patchsweep.runners.packed.packing import Packing, pack
from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.spec.plan import Column, Ints
from patchsweep.spec.sites import Site


@dataclass(frozen=True)
class PatchValues:
    """What is patched in, and where."""

    point: SiteLocation
    # per layer of writing [pair, pos, width]: the values; None: what is there, its last bit turned
    layers: Sequence[Tensor] | None
    # [patch] row of the values, then [row, width] per layer: a vector for each one-token patch
    row: Column | Ints | None = None


@dataclass(frozen=True)
class PackedInput:
    """What one packed batch needs besides the model: prompts of one length, indexed by pair."""

    base: ActivationCache
    donors: Sequence[PatchValues]  # for each of the packed batch's sets
    local: dict[int, int]  # pair of the plan -> row of `base` and of the values


@torch.no_grad()
def run_packed_batch(unwrapped: UnwrappedModel, packed: PackedBatch, given: PackedInput) -> Tensor:
    """The final residual of every row of `packed`, from its start to its last read position.

    Returns `[token, d_model]`, packed like the last packing: row i's tokens, then row i+1's;
    the unembedding knows them by `packed.length - packed.start`.
    """
    state = _State(unwrapped, packed, given)
    hidden: Tensor | None = None
    with ExitStack() as stack:
        stack.enter_context(state.hooks())
        for packing in pack(packed):
            hidden = state.enter(packing, hidden)
            if packing.layer < unwrapped.n_layers:
                hidden = state.replay(hidden)
    assert hidden is not None
    return hidden


class _State:
    """The packed batch at its present layer; hooks and attention functions read it."""

    def __init__(self, unwrapped: UnwrappedModel, packed: PackedBatch, given: PackedInput) -> None:
        self.unwrapped, self.packed, self.given = unwrapped, packed, given
        self.device = given.base.devices[0]  # of the present block
        self.local = np.array([given.local.get(p, -1) for p in range(packed.n_pairs)])
        self.members: dict[str, list[int]] = {}  # site -> which of the packed batch's sets patch it
        for i, donors in enumerate(given.donors):
            self.members.setdefault(donors.point.site.name, []).append(i)
        sites = {donors.point.site.name: donors.point.site for donors in given.donors}
        self.stream = [name for name, site in sites.items() if site.in_stream]
        self.packing: Packing
        self.rows: Rows
        self.token_pair: Tensor
        self.token_pos: Tensor

    def enter(self, packing: Packing, carried: Tensor | None) -> Tensor:
        """The packed batch's tokens `[token, d_model]` at the input of the packing's block."""
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
        """The tokens that come from the block before, and the base run's for all others."""
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
        """The packing's block on `hidden` `[token, d_model]`."""
        layer = self.packing.layer
        call = self.given.base.calls[layer].at(self.token_pair, self.token_pos)
        output = self.unwrapped.blocks[layer](hidden.unsqueeze(0), *call.args, **call.kwargs)
        return first_of(output).squeeze(0)

    def write(self, x: Tensor, *sites: str) -> None:
        """Replace what is patched at `sites` in `x` `[.., token, width]`, in place."""
        packing = self.packing
        if not len(packing.write_token):
            return
        for i in (i for site in sites for i in self.members.get(site, ())):
            mine = self.packed.which[packing.write_row] == i
            if mine.any():
                self._write_set(x, i, packing.write_token[mine], packing.write_row[mine])

    def _write_set(self, x: Tensor, i: int, token: Ints, row: Ints) -> None:
        """Replace the vectors that set i patches, in one launch."""
        packed, donors = self.packed, self.given.donors[i]
        plan, patch = packed.sets[i].plan, packed.patch[row]
        flat = x.view(-1, x.shape[-1])
        if donors.layers is None:
            values, source = last_bit_turned(flat), token
        else:
            donor = donors.layers[self.packing.layer].to(x)
            length, width = donor.shape[-2:]
            values = donor.reshape(-1, width)
            if donors.row is None:
                source = self.local[packed.pair[row]] * length + self.packing.token_pos[token]
            else:
                source = donors.row[patch]
        units, width = plan.axes.units, x.shape[-1]
        if units is None:
            scatter_patch(flat, values, _table(token), source=_table(source))
            return
        n_units = self._n_units(plan.site, width)
        which = plan.unit_set[patch]
        sizes = np.array([len(unit) for unit in units])
        flat_units = np.concatenate([np.array(unit) for unit in units])
        first = np.concatenate([[0], np.cumsum(sizes)])
        repeat = np.repeat(np.arange(len(which)), sizes[which])
        within = np.arange(len(repeat)) - np.repeat(
            np.cumsum(sizes[which]) - sizes[which], sizes[which]
        )
        unit = flat_units[first[which[repeat]] + within]
        scatter_patch(
            flat.view(len(flat), n_units, -1),
            values.view(len(values) * n_units, -1),
            _table(token[repeat]),
            source=_table(source[repeat] * n_units + unit),
            head=_table(unit),
        )

    def _n_units(self, site: Site, width: int) -> int:
        """Heads (or neurons) in one vector of `site`."""
        base, layer = self.given.base, self.packing.layer
        if site.unit == "head":  # a query is as wide as a key, and z as a value
            like = base.keys if site.side == "query" else base.values
            return width // like[layer].shape[-1]
        if site.unit == "kv_head":
            return base.keys[layer].shape[1]
        return width

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Attention on packed rows, and the writes at the patched sites, while the packed batch
        runs."""
        with ExitStack() as stack:
            places: list[HookLocation] = []
            for members in self.members.values():
                point = self.given.donors[members[0]].point
                for layer, place in enumerate(() if point.site.in_stream else point.points):
                    stack.enter_context(watch(place, self._write_at(layer, point)))
                    places.append(place)
            self._drop_unread_tokens(stack, places)
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
            donors.point.site.name for donors in self.given.donors if donors.point.in_attention
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
            base = self.given.base
            prefix_k, prefix_v = (x[layer].to(q.device) for x in (base.keys, base.values))
            z = prefix_attention(q, k, v, prefix_k, prefix_v, self.rows, **settings)
            return written(z, "pattern", "pattern_cell").unsqueeze(0)

        return attend

    def _drop_unread_tokens(self, stack: ExitStack, places: Sequence[HookLocation]) -> None:
        """In the last block only tokens that are read need the MLP: gather them, put them back.

        The others were needed for their keys and values alone. What is written at `places`, by
        hooks that are there already, is written among all tokens: before they are gathered, or
        after they were put back. So nothing is gathered where a place lies inside the MLP.
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
            token = self._index(np.flatnonzero(reads[packing.token_pair, packing.token_pos]))
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
    """On the CPU, where `scatter_patch` checks it without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(array))
