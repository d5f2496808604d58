"""What a store holds: its arrays, how they are cut into units, its coordinates and attributes.

On disk a layout is a Zarr v3 group. Each variable is one array, sharded so that a unit of work
is one whole shard, hence one file with one writer. `progress/<variable>` holds one flag per
unit, which is the digest of the unit's file; `progress/references` holds one per pair, for its
unpatched metrics. `progress/zarr.json` holds the digest of every file that is there from the
start. A layout's files contain no time, host or random number, so that equal runs are equal byte
for byte.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from patchsweep.store.attributes import flat_attributes
from patchsweep.store.difference import attribute_differences, differ, differences
from patchsweep.store.digest import SEAL_BYTES, digest_of

FORMAT = 2
FORMAT_KEY = "patchsweep_store"  # root attribute by which a store is known
PROGRESS = "progress"  # subgroup of the flags; xarray's reading of the root passes it over
COMPLETE = f"{PROGRESS}/zarr.json"  # put last: all other files of the layout are there
DIGESTS = "files"  # attribute of `COMPLETE`: key -> SHA-256 of each other file of the layout
FIXED = ("base_metric", "source_metric")  # [metric, pair], each written once, a pair at a time
REFERENCES = "references"  # their flags: one for both metrics of a pair
INNER_BYTES = 1 << 20  # readers decode at least this much at once, where a shard has as much


@dataclass(frozen=True)
class Unit:
    """What one write fills: a whole shard of one variable."""

    variable: str
    pair_block: int  # index among the blocks along the pairs
    layer_block: int  # and along the layers; 0 if the variable has none
    pairs: range  # pairs that it covers
    layers: range  # layers that it covers; range(0, 1) if the variable has none

    @property
    def name(self) -> str:
        """Such as `z/0.3`."""
        return f"{self.variable}/{self.pair_block}.{self.layer_block}"

    @property
    def first_pair(self) -> int:
        return self.pairs.start


@dataclass(frozen=True)
class Variable:
    """One float32 array; NaN marks what has not run."""

    name: str
    dims: tuple[str, ...]  # such as ("metric", "pair", "layer", "pos", "head"); layer may lack
    shape: tuple[int, ...]
    unit: tuple[int, int]  # pairs and layers in one unit
    attrs: Mapping[str, Any]

    def __post_init__(self) -> None:
        assert self.name.isidentifier(), self.name
        assert self.name not in (PROGRESS, REFERENCES)
        assert len(self.dims) == len(self.shape), (self.dims, self.shape)
        assert "pair" in self.dims, self.dims
        assert min(*self.unit, *self.shape) > 0, (self.unit, self.shape)

    @cached_property
    def shard(self) -> tuple[int, ...]:
        """Cells in one unit along each axis (fewer at the far edge)."""
        cut = {"pair": self.unit[0], "layer": self.unit[1]}
        return tuple(min(cut.get(d, n), n) for d, n in zip(self.dims, self.shape, strict=True))

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """How many blocks of units there are along the pairs and along the layers."""
        return self._blocks_along("pair"), self._blocks_along("layer")

    @property
    def n_units(self) -> int:
        return self.blocks[0] * self.blocks[1]

    def units(self) -> list[Unit]:
        """All units, pairs first."""
        return [self.at(i, j) for i in range(self.blocks[0]) for j in range(self.blocks[1])]

    def at(self, pair_block: int, layer_block: int) -> Unit:
        """The unit with these block indices."""
        covered = []
        for dim, block in (("pair", pair_block), ("layer", layer_block)):
            if dim in self.dims:
                axis = self.dims.index(dim)
                size = self.shard[axis]
                covered.append(range(block * size, min((block + 1) * size, self.shape[axis])))
            else:
                covered.append(range(0, 1))
        return Unit(self.name, pair_block, layer_block, covered[0], covered[1])

    def slices(self, unit: Unit) -> tuple[slice, ...]:
        """Where the unit lies in the array."""
        cut = {"pair": unit.pairs, "layer": unit.layers}
        ranges = [cut.get(d, range(n)) for d, n in zip(self.dims, self.shape, strict=True)]
        return tuple(slice(r.start, r.stop) for r in ranges)

    def block_shape(self, unit: Unit) -> tuple[int, ...]:
        """Shape of the unit's values."""
        return tuple(s.stop - s.start for s in self.slices(unit))

    def shard_key(self, unit: Unit) -> str:
        """The file that holds the unit's values."""
        index = {"pair": unit.pair_block, "layer": unit.layer_block}
        return ".".join([f"{self.name}/c", *(str(index.get(d, 0)) for d in self.dims)])

    def flag_key(self, unit: Unit) -> str:
        """The file that says that the unit is done, and what its file holds."""
        return f"{PROGRESS}/{self.name}/c.{unit.pair_block}.{unit.layer_block}.0"

    def _blocks_along(self, dim: str) -> int:
        if dim not in self.dims:
            return 1
        axis = self.dims.index(dim)
        return -(-self.shape[axis] // self.shard[axis])


@dataclass(frozen=True)
class Layout:
    """All that is known of a store before its first value."""

    variables: tuple[Variable, ...]
    coords: Mapping[str, tuple[tuple[str, ...], np.ndarray]]  # "metric" and "pair" among them
    attrs: Mapping[str, Any]  # JSON: provenance and configuration; equal when a run is resumed

    def __post_init__(self) -> None:
        names = [v.name for v in self.variables] + list(self.coords) + list(FIXED)
        assert len(set(names)) == len(names), names
        sizes: dict[str, int] = {}
        shaped = [(v.dims, v.shape) for v in self.variables]
        for dims, shape in [*shaped, *((d, a.shape) for d, a in self.coords.values())]:
            for dim, size in zip(dims, shape, strict=True):
                assert sizes.setdefault(dim, size) == size, f"{dim}: {size} and {sizes[dim]}"

    @property
    def fixed_shape(self) -> tuple[int, int]:
        """Metrics and pairs: the shape of `base_metric` and `source_metric`."""
        return len(self.coords["metric"][1]), len(self.coords["pair"][1])


def fixed_key(name: str, pair: int) -> str:
    """The file that holds a pair's part of one of `FIXED`."""
    return f"{name}/c.0.{pair}"


def references_key(pair: int) -> str:
    """The file that says that a pair's part of both of `FIXED` is written, and what it holds."""
    return f"{PROGRESS}/{REFERENCES}/c.{pair}.0"


def layout_files(layout: Layout) -> dict[str, bytes]:
    """Every file of a store without values, in the order in which they are put.

    The root group comes first: whoever puts it owns the address. `COMPLETE` comes last.
    """
    files: dict[str, Any] = {}
    attrs = flat_attributes(layout.attrs)
    attrs[FORMAT_KEY] = FORMAT
    # xarray knows the coordinates that bear their dimension's name, and looks here for the others
    others = [name for name, (dims, _) in layout.coords.items() if tuple(dims) != (name,)]
    if others:
        attrs["coordinates"] = " ".join(others)
    with zarr.config.set({"array.write_empty_chunks": True}):
        root = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attrs)
        for name, (dims, values) in layout.coords.items():
            values = np.asarray(values)
            text = values.dtype.kind not in "iufb"
            array = root.create_array(
                name,
                shape=values.shape,
                chunks=values.shape,
                dtype=str if text else values.dtype,
                dimension_names=dims,
                compressors=_ZSTD,
                chunk_key_encoding=_FLAT,
            )
            array[...] = values.astype(object) if text else values
        for variable in layout.variables:
            root.create_array(
                variable.name,
                shape=variable.shape,
                chunks=_inner_chunks(variable.shard),
                shards=variable.shard,
                dtype="float32",
                fill_value=np.nan,
                dimension_names=variable.dims,
                attributes=dict(variable.attrs),
                compressors=_ZSTD,
                chunk_key_encoding=_FLAT,
            )
        for name in FIXED:
            root.create_array(
                name,
                shape=layout.fixed_shape,
                chunks=(layout.fixed_shape[0], 1),
                dtype="float32",
                fill_value=np.nan,
                dimension_names=("metric", "pair"),
                attributes={"long_name": f"metric of the unpatched {name.split('_')[0]} run"},
                compressors=_ZSTD,
                chunk_key_encoding=_FLAT,
            )
        names = {"coords": list(layout.coords), "variables": [v.name for v in layout.variables]}
        progress = root.create_group(PROGRESS, attributes=names)
        for variable in layout.variables:
            _create_flags(progress, variable.name, variable.blocks, SEAL_BYTES)
        _create_flags(progress, REFERENCES, layout.fixed_shape[1:], len(FIXED) * SEAL_BYTES)
    order = sorted(files, key=lambda key: (key != "zarr.json", key == COMPLETE))
    return with_digests({key: settled(key, files[key].to_bytes()) for key in order})


def _create_flags(progress: zarr.Group, name: str, shape: tuple[int, ...], size: int) -> None:
    """An array whose chunks are the flags of one variable: `size` bytes each, as they are."""
    progress.create_array(
        name,
        shape=(*shape, size),
        chunks=(*(1 for _ in shape), size),
        dtype="uint8",
        fill_value=0,
        dimension_names=(*(f"{dim}_block" for dim in ("pair", "layer")[: len(shape)]), "digest"),
        compressors=None,
        chunk_key_encoding=_FLAT,
    )


def with_digests(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files`, with the digests of all in the attributes of `COMPLETE`, which is one of them."""
    complete = json.loads(files[COMPLETE])
    complete.setdefault("attributes", {})[DIGESTS] = {
        key: digest_of(data) for key, data in sorted(files.items()) if key != COMPLETE
    }
    return {**files, COMPLETE: json.dumps(complete, indent=2).encode()}


def group_of(files: Mapping[str, bytes]) -> zarr.Group:
    """The Zarr group that `files` make up, to read."""
    memory = MemoryStore({key: Buffer.from_bytes(data) for key, data in files.items()})
    return zarr.open_group(memory, mode="r", zarr_format=3, use_consolidated=False)


def first_difference(mine: zarr.Group, theirs: zarr.Group) -> str | None:
    """Where two whole layouts differ first, and how; None if they are equal.

    Attributes come first, then coordinates, then variables.
    """
    return next(_group_differences(mine, theirs), None)


class Encoder:
    """Turns a block of values into the bytes of its one file, by way of a Zarr array in memory."""

    def __init__(self, metadata: bytes) -> None:
        """`metadata`: the array's `zarr.json`."""
        self._files: dict[str, Any] = {"zarr.json": Buffer.from_bytes(metadata)}
        self._lock = threading.Lock()
        # an all-NaN block is a file like any other; a setting of the open array, not stored in it
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._array = zarr.open_array(MemoryStore(self._files), mode="r+")

    def encode(self, where: tuple[slice, ...], values: np.ndarray) -> bytes:
        """The file of the one chunk or shard that `where` covers whole."""
        with self._lock:
            self._array[where] = values
            (key,) = self._files.keys() - {"zarr.json"}  # else `where` met several
            data: bytes = self._files.pop(key).to_bytes()
        return data


# one folder per array: each new folder on the way to a file would be one more wait for the disk
_FLAT: Any = {"name": "default", "separator": "."}
_ZSTD = ZstdCodec(level=3, checksum=True)  # the checksum lets a reader notice rotten bytes


def settled(key: str, data: bytes) -> bytes:
    """Metadata spelled in the same way by every version of zarr; other files as they are."""
    if not key.endswith("zarr.json"):
        return data
    metadata = json.loads(data)
    if metadata.get("consolidated_metadata", 0) is None:  # zarr 3.1.3 spells out that there is none
        del metadata["consolidated_metadata"]
    return json.dumps(metadata, indent=2).encode()


def _inner_chunks(shard: tuple[int, ...]) -> tuple[int, ...]:
    """Equal parts of a shard, of about `INNER_BYTES`, cut along the first axes first."""
    inner = list(shard)
    for axis, size in enumerate(shard):
        wanted = -(-4 * math.prod(inner) // INNER_BYTES)
        parts = min(n for n in range(1, size + 1) if size % n == 0 and n >= min(wanted, size))
        inner[axis] = size // parts
    return tuple(inner)


def _group_differences(mine: zarr.Group, theirs: zarr.Group) -> Iterator[str]:
    yield from attribute_differences(dict(mine.attrs), dict(theirs.attrs))
    ours, others = _array_names(mine), _array_names(theirs)
    for name in dict.fromkeys([*ours, *others]):
        if name not in ours or name not in others:
            yield f"array {name} is only in {'this run' if name in ours else 'the store'}"
            continue
        left, right = mine[name], theirs[name]
        yield from differences(name, _form(left), _form(right))
        if ours[name] == "coords":
            a, b = _objects(left), _objects(right)
            for index in np.argwhere(a != b)[:1]:
                where = ", ".join(map(str, index))
                yield differ(f"{name}[{where}]", a[tuple(index)], b[tuple(index)])


def _array_names(root: zarr.Group) -> dict[str, str]:
    """Each array of a store, and which kind it is: coords, variables or fixed."""
    names: Any = root[PROGRESS].attrs
    kinds = {"coords": names["coords"], "variables": names["variables"], "fixed": FIXED}
    return {name: kind for kind, members in kinds.items() for name in members}


def _objects(array: Any) -> np.ndarray:
    return np.asarray(array[...]).astype(object)


def _form(array: Any) -> dict[str, Any]:
    """What must agree for two arrays to be parts of one run."""
    return {
        "dims": array.metadata.dimension_names,
        "shape": array.shape,
        "dtype": str(array.dtype),
        "unit": array.shards,
        "attrs": dict(array.attrs),
    }
