"""The cells of a sweep: what each cell patches, and where its values differ from the base run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformer_lens import patching as tl
from transformer_lens.utilities import get_act_name

from patchsweep.forward.unwrapped import Unsupported
from patchsweep.spec.plan import Bools, Ints
from patchsweep.spec.sites import SITES, Site

# the meaning of `index_df`'s columns for each of TransformerLens's patch setters
COLUMNS: dict[Callable[..., Tensor], tuple[str, ...]] = {
    tl.layer_pos_patch_setter: ("layer", "pos"),
    tl.layer_pos_head_vector_patch_setter: ("layer", "pos", "unit"),
    tl.layer_head_vector_patch_setter: ("layer", "unit"),
    tl.layer_head_pattern_patch_setter: ("layer", "unit"),
    tl.layer_head_pos_pattern_patch_setter: ("layer", "unit", "pos"),
    tl.layer_head_dest_src_pos_pattern_patch_setter: ("layer", "unit", "pos", "src"),
}
PATTERN_SETTERS = tuple(setter for setter in COLUMNS if "pattern" in setter.__name__)


@dataclass(frozen=True)
class Cells:
    """Cells in sweep order; each cell is one patch of the whole batch of prompts."""

    site: Site
    layer: Ints  # [cell]
    pos: Ints | None  # [cell] position (of the pattern: destination); None: all positions
    unit: Ints | None  # [cell] head or neuron; None: the whole vector
    src: Ints | None  # [cell] source position of one entry of the pattern; None: whole rows
    index: Ints  # [cell, column] the rows of `index_df`, counted from the start

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def layers(self) -> list[int]:
        """The patched layers, ascending."""
        return [int(layer) for layer in np.unique(self.layer)]


@dataclass(frozen=True)
class Rows:
    """The runs that a sweep needs: one row per cell and prompt where values differ."""

    cell: Ints  # [row] ascending
    prompt: Ints  # [row] in the batch; ascending within a cell
    start: Ints  # [row] first position whose value differs
    stop: Ints  # [row] past the last one

    def __len__(self) -> int:
        return len(self.cell)

    def of(self, cell: int) -> slice:
        """Return the rows of `cell`."""
        first, stop = np.searchsorted(self.cell, [cell, cell + 1])
        return slice(int(first), int(stop))


def find_site(activation_name: str, layers: Sequence[int]) -> Site:
    """Return the site that TransformerLens calls `activation_name`.

    Raises:
        Unsupported: no site has this name, or the site has no layers.
    """
    for site in SITES.values():
        if site.layered and all(
            get_act_name(activation_name, layer) == site.hook_name(layer) for layer in layers
        ):
            return site
    raise Unsupported(f"{activation_name!r} is not one of patchsweep's sites")


def make_cells(
    setter: Callable[..., Any],
    activation_name: str,
    index: pd.DataFrame,
    sizes: Mapping[str, int],
) -> Cells:
    """Return the cells that `setter` patches, one per row of `index`.

    Negative indices count from the end. `sizes` are the numbers of layers, positions and units.

    Raises:
        Unsupported: the setter, the activation or an index needs TransformerLens's own loop.
    """
    if setter not in COLUMNS:
        raise Unsupported("the patch setter is not one of TransformerLens's own")
    columns = COLUMNS[setter]
    if index.shape[1] != len(columns) or not all(
        np.issubdtype(dtype, np.integer) for dtype in index.dtypes
    ):
        raise Unsupported(f"index_df does not hold whole numbers for {', '.join(columns)}")
    indices: dict[str, Ints] = {}
    for i, name in enumerate(columns):
        size = sizes["pos" if name == "src" else name]
        values = index.iloc[:, i].to_numpy(np.int64)
        lowest = 0 if name == "layer" else -size
        if len(values) and not lowest <= values.min() <= values.max() < size:
            raise Unsupported(f"index_df has a {name} outside the model or the prompt")
        indices[name] = values % size
    site = find_site(activation_name, np.unique(indices["layer"]).tolist())
    if site.is_pattern != (setter in PATTERN_SETTERS):
        raise Unsupported(f"{setter.__name__} indexes {site.name} along another axis")
    if "unit" in indices and site.unit is None:
        raise Unsupported(f"{site.name} has no heads")
    return Cells(
        site,
        layer=indices["layer"],
        pos=indices.get("pos"),
        unit=indices.get("unit"),
        src=indices.get("src"),
        index=np.stack([*indices.values()], axis=1),
    )


def differing(base: Tensor, clean: Tensor, cells: Cells) -> Bools:
    """Return where two activations of a layer differ in any bit.

    The shape is `[prompt, pos, unit]`, with one unit where the cells cover whole vectors; for
    single entries of the pattern it is `[prompt, unit, pos, src]`.
    """
    differs = (base != clean).cpu()
    if cells.src is not None:
        return differs.numpy()
    if cells.site.is_pattern:
        return differs.any(dim=-1).transpose(1, 2).numpy()
    if cells.unit is None:
        return differs.flatten(2).any(dim=-1, keepdim=True).numpy()
    return differs.numpy() if differs.ndim == 3 else differs.any(dim=-1).numpy()


def live_rows(cells: Cells, differs: Mapping[int, Bools]) -> Rows:
    """Return the rows of `cells` from the `differing` masks of every patched layer."""
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []  # cell, prompt, start, stop
    for layer in cells.layers:
        cell = np.flatnonzero(cells.layer == layer)
        table = differs[layer]
        unit = np.zeros(len(cell), np.int64) if cells.unit is None else cells.unit[cell]
        if cells.pos is None:
            covered = table[:, :, unit]  # [prompt, pos, cell]
            live = covered.any(axis=1)
            start = covered.argmax(axis=1)
            stop = covered.shape[1] - covered[:, ::-1].argmax(axis=1)
        else:
            pos = cells.pos[cell]
            if cells.src is None:
                live = table[:, pos, unit]  # [prompt, cell]
            else:
                live = table[:, unit, pos, cells.src[cell]]
            start = np.broadcast_to(pos, live.shape)
            stop = start + 1
        index, prompt = np.nonzero(live.T)
        parts.append((cell[index], prompt, start[prompt, index], stop[prompt, index]))
    rows = [np.concatenate([part[i] for part in parts]).astype(np.int64) for i in range(4)]
    order = np.lexsort((rows[1], rows[0]))
    return Rows(*(column[order] for column in rows))
