"""Logits of patched runs from packed batches, per cell, at the positions a patch can change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import repeat
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.forward.capture import capture, check_attention_sites
from patchsweep.forward.site_locations import SiteLocation, resolve_site
from patchsweep.forward.unembed import Unembed
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.runners.packed.forward import run_packed_batch
from patchsweep.runners.packed.schedule import make_packed_batches
from patchsweep.runners.packed.tables import PackedInput, PatchValues
from patchsweep.spec.plan import Axes, Ints, PatchSet, PatchTable
from patchsweep.spec.plan import Cells as PlanCells
from patchsweep.transformer_lens.cells import Cells, Rows

# tokens of a packed batch: enough for full matrix-product speed
MAX_TOKENS = 4096

# where a run differs, an index into `[prompt, pos]`, and its logits there [token, d_vocab]
Written = tuple[tuple[Any, Any], Tensor]


class PackedCells:
    """Runs the patches `cells` on the prompts `tokens` `[prompt, pos]`.

    `base` and `clean` hold the hook's activation of every patched layer. With `in_place` false,
    only the module right after the hook reads the patch values. The base run's activations of the
    sites `keep` are kept.

    Raises:
        Unsupported: packed batches do not support the model or the site.
    """

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Tensor,
        cells: Cells,
        rows: Rows,
        base: Mapping[int, Tensor],
        clean: Mapping[int, Tensor],
        *,
        in_place: bool,
        keep: Sequence[SiteLocation] = (),
    ) -> None:
        self.cells, self.rows, self._base, self._clean = cells, rows, base, clean
        self.unwrapped = UnwrappedModel(model)
        self.point = replace(resolve_site(self.unwrapped, cells.site), in_place=in_place)
        check_attention_sites(self.unwrapped, [self.point])
        self.run = capture(self.unwrapped, tokens, keep)
        self.unembed = Unembed(self.unwrapped)
        self._check_shapes()
        self.plan = self._plan(tokens)
        self._patch_values = None if cells.src is not None else self._place(self._values())

    @torch.no_grad()
    def base_logits(self) -> Iterator[tuple[Ints, Tensor]]:
        """Yield parts of the base run's logits: flat indices into `(prompt pos)`, and logits."""
        final = self.run.resid[-1].flatten(0, 1)
        for part in self.unembed.chunks(len(final)):
            yield np.arange(part.start, part.stop), self.unembed.logits(final[part])

    @torch.no_grad()
    def written(self, cells: Sequence[int]) -> Iterator[list[Written]]:
        """Yield for each of `cells`, in order, the logits that its rows change."""
        rows_of_cell = [range(*self.rows.of(cell).indices(len(self.rows))) for cell in cells]
        n_tokens = [int(self.plan.suffix[list(rows)].sum()) for rows in rows_of_cell]
        for group in groups(n_tokens, MAX_TOKENS):
            rows = np.array([row for i in group for row in rows_of_cell[i]], dtype=np.int64)
            resid = self._final_residuals(rows)
            chunk = self.unembed.chunk_rows()
            for part in groups([n_tokens[i] for i in group], chunk):
                members = [rows_of_cell[group[i]] for i in part]
                yield from self._read(members, resid)

    def _read(
        self, members: Sequence[range], resid: Mapping[int, Tensor]
    ) -> Iterator[list[Written]]:
        """Yield the suffix logits of a few cells from one call of the unembedding."""
        rows = [row for member in members for row in member]
        if not rows:
            yield from ([] for _ in members)
            return
        logits = self.unembed.logits(torch.cat([resid[row] for row in rows]))
        row_logits = dict(zip(rows, logits.split([len(resid[row]) for row in rows]), strict=True))
        for member in members:
            yield [
                (
                    (int(self.rows.prompt[row]), slice(int(self.rows.start[row]), None)),
                    row_logits[row],
                )
                for row in member
            ]

    def _final_residuals(self, rows: Ints) -> dict[int, Tensor]:
        """Return the final residuals of `rows`, each `[pos, d_model]` from its `start` on."""
        residuals: dict[int, Tensor] = {}
        if not len(rows):
            return residuals
        packed_input = self.packed_input(rows)
        for packed in make_packed_batches([PatchSet(self.plan, rows)], MAX_TOKENS):
            hidden = run_packed_batch(self.unwrapped, packed, packed_input)
            sizes = (packed.length - packed.start).tolist()
            residuals.update(zip(packed.patch.tolist(), hidden.split(sizes), strict=True))
        return residuals

    def packed_input(self, rows: Ints) -> PackedInput:
        """Return what packed batches of `rows` need besides the model."""
        value_row: Ints | None = None
        patch_values = self._patch_values
        if patch_values is None:
            value_row = np.zeros(len(self.rows), np.int64)
            value_row[rows] = np.arange(len(rows))
            patch_values = self._place(self._entry_values(rows))
        return PackedInput(
            base=self.run,
            patch_values=[PatchValues(self.point, patch_values, value_row)],
            local={prompt: prompt for prompt in range(self.plan.shape[0])},
        )

    def _plan(self, tokens: Tensor) -> PatchTable:
        cells, rows = self.cells, self.rows
        n_prompts, n_pos = tokens.shape
        n_layers = self.unwrapped.n_layers
        units = None
        if cells.unit is not None:
            units = tuple((unit,) for unit in range(int(cells.unit.max()) + 1))
        return PatchTable(
            site=cells.site,
            axes=Axes(layers=tuple((i,) for i in range(n_layers)), positions=None, units=units),
            shape=(n_prompts, len(cells), 1, 1),
            lengths=np.full(n_prompts, n_pos),
            reads=np.ones((n_prompts, n_pos), dtype=bool),  # a metric may read any position
            n_layers=n_layers,
            table=PlanCells(
                pair=rows.prompt,
                layer_set=cells.layer[rows.cell],
                unit_set=(
                    np.zeros(len(rows), np.int64) if cells.unit is None else cells.unit[rows.cell]
                ),
                start=rows.start,
                stop=rows.stop,
            ),
        )

    def _values(self) -> dict[int, Tensor]:
        """Return per layer the clean values `[prompt, pos, width]` that a packed batch writes."""
        if self.cells.site.is_pattern:
            # a patched row of the pattern changes only z of its token, so the patch value is a z
            return {layer: self._attend(layer, p) for layer, p in self._clean.items()}
        return {layer: x.flatten(2) for layer, x in self._clean.items()}

    def _entry_values(self, rows: Ints) -> dict[int, Tensor]:
        """Return per layer `[row, width]`: z of each row's token, one pattern entry replaced.

        Rows that patch other layers are uninitialised.
        """
        cells, values_of_layer = self.cells, {}
        assert cells.pos is not None
        assert cells.unit is not None
        assert cells.src is not None
        cell = self.rows.cell[rows]
        for layer in np.unique(cells.layer[cell]).tolist():
            base, clean = self._base[layer], self._clean[layer]
            layer_rows = np.flatnonzero(cells.layer[cell] == layer)
            device = base.device
            prompt, head, pos, src = (
                torch.from_numpy(np.ascontiguousarray(x[layer_rows])).to(device)
                for x in (
                    self.rows.prompt[rows],
                    cells.unit[cell],
                    cells.pos[cell],
                    cells.src[cell],
                )
            )
            v = self.run.values[layer]
            d_head = v.shape[-1]
            change = clean[prompt, head, pos, src] - base[prompt, head, pos, src]
            kv_head = head // (base.shape[1] // v.shape[1])
            z = self._attend(layer, base)[prompt, pos].unflatten(1, (-1, d_head))
            arange = torch.arange(len(layer_rows), device=device)
            z[arange, head] += change.to(v).unsqueeze(1) * v[prompt, kv_head, src]
            values = z.new_empty(len(rows), z.shape[1] * d_head)
            values[torch.from_numpy(layer_rows).to(device)] = z.flatten(1)
            values_of_layer[layer] = values
        return values_of_layer

    def _attend(self, layer: int, pattern: Tensor) -> Tensor:
        """Return z `[prompt, pos, (head d_head)]` of a pattern `[prompt, head, dest, src]`."""
        v = self.run.values[layer]
        v = repeat(v, "p kv src d -> p (kv g) src d", g=pattern.shape[1] // v.shape[1])
        z = torch.einsum("phqs,phsd->pqhd", pattern.to(v), v)
        return z.flatten(2)

    def _place(self, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Return `values` as a list by the layer that writes them; unpatched layers are empty."""
        empty = torch.empty(0, device=self.run.resid[0].device)
        shift = self.cells.site.shift
        return [values.get(i - shift, empty) for i in range(self.unwrapped.n_layers + shift)]

    def _check_shapes(self) -> None:
        """Raise Unsupported for hooks whose activation lacks the plain model's shape."""
        site = self.cells.site
        v, k = self.run.values[0], self.run.keys[0]
        for layer, x in self._base.items():
            hook = self.unwrapped.bridge.hook_dict[site.hook_name(layer)]
            if not site.is_pattern and hook.pos_dim not in (None, 1):
                # the shape alone would pass for a prompt with as many tokens as heads
                raise Unsupported(f"the hook of {site.name} sees heads before positions")
            fits = x.ndim == 3
            if site.unit == "kv_head":
                fits = x.ndim == 4 and x.shape[2] == k.shape[1]
            elif site.is_pattern:
                fits = x.shape[1] % v.shape[1] == 0
            elif site.unit == "head":
                fits = x.ndim == 4 and x.shape[3] == v.shape[3]
            if not fits:
                raise Unsupported(f"the hook of {site.name} sees a tensor {tuple(x.shape)}")


class PrecomputedModel:
    """The model interface of `generic_activation_patch` with patched runs from packed batches.

    `base` are the logits of the unpatched run. `cells` yields, in order, the logits that each cell
    changes. Other attributes are `model`'s.
    """

    def __init__(
        self, model: TransformerBridge, base: Tensor, cells: Iterator[list[Written]]
    ) -> None:
        self._model, self._base, self._patched = model, base, cells

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.no_grad()
    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        """Return full logits `[batch, pos, d_vocab]` of the next cell; without hooks, of the base.

        Each call returns a new tensor, since a metric may change or keep it.
        """
        return self.patched(next(self._patched) if fwd_hooks else ())

    def patched(self, written: Sequence[Written]) -> Tensor:
        """Return the base run's logits with `written` over them."""
        logits = self._base.clone()
        for where, values in written:
            logits[where] = values
        return logits


def groups(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield groups of adjacent indices whose `sizes` sum to about `most`, at least one each."""
    if not sizes:
        return
    total = np.cumsum(sizes)
    n_groups = max(1, -(-int(total[-1]) // most))
    # groups of equal size rather than full groups and a small last one
    group_size = max(1, -(-int(total[-1]) // n_groups))
    for _, group in itertools.groupby(
        range(len(sizes)), lambda i: (int(total[i]) - 1) // group_size if total[i] else 0
    ):
        yield list(group)
