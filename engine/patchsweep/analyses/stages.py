"""Runs an analysis in stages: each is a resumable store of shards until the results are stored.

A stage is one kind of computation, such as the estimates of all edges or the exact runs of the
largest. With a store, stage `exact` of the analysis at `e.zarr` writes its shards to
`e.zarr.parts/2-exact`, a store like a sweep's, with leases and a journal. Slices divide the stages
that need no others. The results are assembled from the complete stages and written to `e.zarr` at
once, and `e.zarr.parts` is deleted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_store_path
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PatchsweepError, StoreError
from patchsweep.store.attributes import flat_attributes
from patchsweep.store.backends.address import open_folder
from patchsweep.store.contents import KIND
from patchsweep.store.difference import IDENTITY
from patchsweep.store.layout import PARTS, Layout, Unit, Variable
from patchsweep.store.lease import process_of, read_leases
from patchsweep.store.save import check_place, load_dataset, save_dataset
from patchsweep.store.store import Store
from patchsweep.sweeps.api import sweep
from patchsweep.sweeps.executor import (
    WAIT_S,
    Progress,
    Slice,
    Values,
    check_progress,
    name_stage,
    run_into,
)
from patchsweep.sweeps.identity import read_weights, refuse_unversioned
from patchsweep.sweeps.layout import analysis_attrs

# variable -> its dims, `pair` among them, and their sizes
Shapes = Mapping[str, Mapping[str, int]]
# variable -> values of a block of pairs, and base and source metric [2, metric, pair] or None
Computed = tuple[Mapping[str, Values], Values | None]


def empty(shapes: Shapes, pairs: range) -> dict[str, Values]:
    """Return arrays of NaN for the values of a block of pairs."""
    return {
        name: np.full([{**dims, "pair": len(pairs)}[dim] for dim in dims], np.nan, np.float32)
        for name, dims in shapes.items()
    }


class Unfinished(PatchsweepError):
    """This slice has done its units, and what follows needs units of other slices."""


class Stages:
    """Runs the stages of one analysis, in memory or with a store; see the module."""

    def __init__(
        self,
        store: str | Path | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        slice_index: int = 0,
        n_slices: int = 1,
        progress: Progress | bool | None = None,
    ) -> None:
        """Arguments are those of `patchsweep.sweep`."""
        if store is not None:
            check_store_path(store)
        elif n_slices != 1:
            raise ConfigError(f"n_slices={n_slices} needs a store, where the slices meet; give one")
        self.slice = Slice(slice_index, n_slices)
        self.progress = check_progress(progress)
        self.store, self.storage_options = store, storage_options
        self.parts = None if store is None else os.fspath(store).rstrip("/") + PARTS
        self.known = False  # whether `results` found the results in the store
        self._begun: list[str] = []  # addresses of the stages' stores
        self._inner = False  # whether `results` is running
        self._attrs: Mapping[str, Any] = {}  # of the analysis that is computed

    @staticmethod
    def of(stages: Stages | None) -> Stages:
        """Return `stages`; None: stages in memory.

        Raises:
            ConfigError: it is something else.
        """
        if not isinstance(stages, Stages | None):
            raise ConfigError(f"stages={stages!r} must be Stages('runs/edges.zarr'), say")
        return stages or Stages()

    def results(
        self,
        model: TransformerBridge,
        attrs: Callable[[], Mapping[str, Any]],
        compute: Callable[[], xr.Dataset],
    ) -> xr.Dataset:
        """Return the results with the attributes `attrs()`, stored or computed.

        `compute` need not set them; what it sets is kept besides. With a store, `attrs` identify
        the results, after the model's weights have been read. If `compute` is interrupted, a
        second call goes on: finished shards are kept. The analyses that `compute` calls with these
        stages return theirs unstored.

        Raises:
            ConfigError: `attrs` name a function that has no version to identify it.
            StoreError: the path holds something other than results with `attrs`.
            Unfinished: what remains needs shards of other slices.
        """
        if self.store is None or self._inner:
            return self._computed(attrs(), compute)
        read_weights(model)
        identified = attrs()
        refuse_unversioned(identified[IDENTITY])
        place = self.store, identified, self.storage_options
        ds = load_dataset(*place)
        self.known = ds is not None
        if ds is None:
            check_place(*place)  # fail before the computation
            self._inner = True
            try:
                ds = self._computed(identified, compute).load()
                save_dataset(ds, self.store, self.storage_options)
            except Exception:  # another process may have stored the results and deleted the stages
                ds = load_dataset(*place)
                if ds is None:
                    raise
                self.known = True
            finally:
                self._inner = False
        self._delete()
        return ds

    def _computed(self, attrs: Mapping[str, Any], compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """Return what `compute` returns, with `attrs`, which its stages know meanwhile."""
        outer, self._attrs = self._attrs, attrs
        try:
            ds = compute()
        finally:
            self._attrs = outer
        # they come first, and hold also if an analysis inside of this one has set its own
        ds.attrs = flat_attributes({**attrs, **ds.attrs, **attrs})
        return ds

    def analysis(
        self,
        kind: str,
        model: TransformerBridge,
        pairs: PromptPairs,
        settings: Mapping[str, Any],
        compute: Callable[[], xr.Dataset],
        config: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Return the results of an analysis that `settings` decide; see `results`."""
        return self.results(
            model, lambda: analysis_attrs(kind, model, pairs, settings, config), compute
        )

    def run(
        self,
        name: str,
        shapes: Shapes,
        block: int,
        compute: Callable[[range], Computed],
        *,
        cost: int = 0,
        metrics: Sequence[str] = ("none",),
        attrs: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Run the missing shards of the stage `name`, each the values of `block` pairs.

        With a store, the values are there after `wait` alone, and are read lazily.

        Args:
            compute: returns the values of all variables for a range of pairs.
            cost: token-layers of one pair.
            metrics: names of the metrics of `base_metric` and `source_metric`.
            attrs: what decides the values besides the attributes of the analysis.
        """
        return self.run_by_layer(
            name,
            shapes,
            block,
            lambda pairs, _: compute(pairs),
            lambda _: cost,
            metrics=metrics,
            attrs=attrs,
            n_layers=max(dims.get("layer", 1) for dims in shapes.values()),
        )

    def run_by_layer(
        self,
        name: str,
        shapes: Shapes,
        block: int,
        compute: Callable[[range, int], Computed],
        cost: Callable[[int], int],
        *,
        metrics: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        n_layers: int = 1,
    ) -> xr.Dataset:
        """Run a stage whose shards hold `n_layers` layers each of `block` pairs; see `run`.

        Every variable has the dim `layer`. `compute` and `cost` take a shard's first layer too.
        """
        work = _BlockWork(compute, cost, len(metrics), next(iter(shapes)))
        deciding = {**self._attrs, **(attrs or {})}
        sizes = {dim: n for shape in shapes.values() for dim, n in shape.items()}
        layout = Layout(
            variables=tuple(
                Variable(key, tuple(dims), tuple(dims.values()), (block, n_layers), {})
                for key, dims in shapes.items()
            ),
            coords={
                "metric": (("metric",), np.array(metrics, dtype=object)),
                "pair": (("pair",), np.arange(sizes["pair"])),
            },
            attrs={**{key: x for key, x in deciding.items() if key != KIND}, "stage": name},
        )
        name_stage(self.progress, name)
        store = None if self.parts is None else self._begin(name)
        return run_into(
            store,
            layout,
            lambda _: [work],
            self.progress,
            self.slice,
            storage_options=self.storage_options,
        )

    def sweep(self, name: str, *args: Any, **settings: Any) -> xr.Dataset:
        """Run `patchsweep.sweep` with these arguments as the stage `name`; see `run`."""
        if self.parts is not None:
            settings |= {
                "store": self._begin(name),
                "storage_options": self.storage_options,
                "slice_index": self.slice.index,
                "n_slices": self.slice.n,
            }
        name_stage(self.progress, name)
        return sweep(*args, progress=self.progress, **settings)

    def wait(self) -> None:
        """Wait for all shards of the stages begun so far; what follows is not divided in slices.

        Raises:
            Unfinished: shards are missing, and no process computes them.
        """
        while missing := self._missing():
            n_missing = sum(len(units) for _, units in missing)
            holders: Counter[str] = Counter()
            for store, units in missing:
                leases = read_leases(store.folder.beside(".leases"))
                held = (leases[unit.name] for unit in units if unit.name in leases)
                holders.update(process_of(lease.owner) for lease in held if lease.live)
            if not holders:
                raise Unfinished(
                    f"slice {self.slice.index} of {self.slice.n} has done its units; "
                    f"{n_missing} units of other slices are missing, and no process computes them: "
                    "start those slices, and the last of them does what follows"
                )
            self.progress.waiting(n_missing, holders)
            time.sleep(WAIT_S)
        self.slice = Slice()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, stages are not divided in slices; stages behind it are again."""
        own, self.slice = self.slice, Slice()
        try:
            yield
        finally:
            self.slice = own

    def _begin(self, name: str) -> str:
        assert self.parts is not None
        url = f"{self.parts}/{len(self._begun) + 1}-{name}"
        self._begun.append(url)
        return url

    def _delete(self) -> None:
        assert self.parts is not None
        with suppress(StoreError):  # the results are stored all the same
            open_folder(self.parts, self.storage_options).delete_all()

    def _missing(self) -> list[tuple[Store, list[Unit]]]:
        """Return the stores with missing or damaged shards, and these."""
        stores = [Store.open(url, storage_options=self.storage_options) for url in self._begun]
        to_do = [(store, store.survey().to_do) for store in stores]
        return [(store, units) for store, units in to_do if units]


class _BlockWork:
    """A `Work` that computes all variables of a block of pairs, and of layers, together."""

    def __init__(
        self,
        compute: Callable[[range, int], Computed],  # of pairs, and the first layer
        cost: Callable[[int], int],
        n_metrics: int,
        counted: str,  # the variable that bears the cost of all
    ) -> None:
        self.compute, self._cost = compute, cost
        self.n_metrics, self._counted = n_metrics, counted
        self._kept: dict[Hashable, Computed] = {}

    def __contains__(self, variable: str) -> bool:
        return True

    def cost(self, unit: Unit) -> int:
        """See `Work`."""
        counts = unit.variable == self._counted
        return self._cost(unit.layers.start) * len(unit.pairs) if counts else 0

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        return 0

    def together(self, unit: Unit) -> Hashable:
        """See `Work`."""
        return unit.pair_block, unit.layer_block

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        values, _ = self._of(units[0])
        return [values[unit.variable] for unit in units]

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`; NaN for a stage that has none."""
        _, references = self._of(unit)
        if references is None:
            references = np.full((2, self.n_metrics, len(unit.pairs)), np.nan, np.float32)
        return references[0], references[1]

    def _of(self, unit: Unit) -> Computed:
        """Return what `compute` returns for the shard; the last result is kept."""
        key = self.together(unit)
        if key not in self._kept:
            self._kept = {key: self.compute(unit.pairs, unit.layers.start)}
        return self._kept[key]
