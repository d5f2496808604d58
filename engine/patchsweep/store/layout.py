"""The layout of a store: its arrays, their division into shards, coordinates and attributes.

On disk a layout is a Zarr v3 group. Each variable is one array. A unit of work (`Unit`) is one Zarr
shard, hence one file with one writer. `progress/<variable>` holds one flag per shard: the digest of
its file. `progress/references` holds one flag per pair, for its unpatched metrics.
`progress/zarr.json` holds the digest of each file that the layout itself has. These files contain
no time, host or random number, so that equal runs are equal byte for byte.
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
FORMAT_KEY = "patchsweep_store"  # root attribute that marks a store
PROGRESS = "progress"  # subgroup of the flags; xarray skips it when it reads the root
COMPLETE = f"{PROGRESS}/zarr.json"  # written last: all other files of the layout exist
DIGESTS = "files"  # attribute of `COMPLETE`: key -> SHA-256 of each other file of the layout
FIXED = ("base_metric", "source_metric")  # arrays [metric, pair], written pair by pair
REFERENCES = "references"  # flags of `FIXED`: one for both metrics of a pair
PARTS = ".parts"  # suffix of the folder of an unfinished analysis: a store for each stage
INNER_BYTES = 1 << 20  # size of inner chunks, the least that a reader decodes


@dataclass(frozen=True)
class Unit:
    """A shard of one variable, which a process writes at once."""

    variable: str
    pair_block: int  # index of the block along the pairs
    layer_block: int  # index of the block along the layers; 0 if the variable has no layers
    pairs: range  # pairs in the shard
    layers: range  # layers in the shard; range(0, 1) if the variable has no layers

    @property
    def name(self) -> str:
        """`<variable>/<pair_block>.<layer_block>`, such as `z/0.3`."""
        return f"{self.variable}/{self.pair_block}.{self.layer_block}"

    @property
    def first_pair(self) -> int:
        return self.pairs.start


@dataclass(frozen=True)
class Variable:
    """A float32 array; NaN marks cells that have not run."""

    name: str
    dims: tuple[str, ...]  # such as ("metric", "pair", "layer", "pos", "head"); layer is optional
    shape: tuple[int, ...]
    unit: tuple[int, int]  # pairs and layers in one shard
    attrs: Mapping[str, Any]

    def __post_init__(self) -> None:
        assert self.name.isidentifier(), self.name
        assert self.name not in (PROGRESS, REFERENCES)
        assert len(self.dims) == len(self.shape), (self.dims, self.shape)
        assert "pair" in self.dims, self.dims
        assert min(*self.unit, *self.shape) > 0, (self.unit, self.shape)

    @cached_property
    def shard(self) -> tuple[int, ...]:
        """Shape of a shard (smaller at the far edge of the array)."""
        cut = {"pair": self.unit[0], "layer": self.unit[1]}
        return tuple(min(cut.get(d, n), n) for d, n in zip(self.dims, self.shape, strict=True))

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """Numbers of blocks along the pairs and along the layers."""
        n = {d: -(-n // m) for d, n, m in zip(self.dims, self.shape, self.shard, strict=True)}
        return n["pair"], n.get("layer", 1)

    @property
    def n_units(self) -> int:
        return self.blocks[0] * self.blocks[1]

    def units(self) -> list[Unit]:
        """Return all shards, ordered by pairs and then layers."""
        return [self.at(i, j) for i in range(self.blocks[0]) for j in range(self.blocks[1])]

    def at(self, pair_block: int, layer_block: int) -> Unit:
        """Return the shard with these block indices."""
        blocks = {"pair": pair_block, "layer": layer_block}
        ranges = {"layer": range(1)}
        for dim, n, size in zip(self.dims, self.shape, self.shard, strict=True):
            if dim in blocks:
                ranges[dim] = range(n)[blocks[dim] * size :][:size]
        return Unit(self.name, pair_block, layer_block, ranges["pair"], ranges["layer"])

    def slices(self, unit: Unit) -> tuple[slice, ...]:
        """Return the slices of the array that the shard covers."""
        cut = {"pair": unit.pairs, "layer": unit.layers}
        ranges = [cut.get(d, range(n)) for d, n in zip(self.dims, self.shape, strict=True)]
        return tuple(slice(r.start, r.stop) for r in ranges)

    def block_shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape of the shard's values."""
        return tuple(s.stop - s.start for s in self.slices(unit))

    def shard_key(self, unit: Unit) -> str:
        """Return the key of the file with the shard's values."""
        index = {"pair": unit.pair_block, "layer": unit.layer_block}
        return ".".join([f"{self.name}/c", *(str(index.get(d, 0)) for d in self.dims)])

    def flag_key(self, unit: Unit) -> str:
        """Return the key of the shard's flag: its digest, written once the shard is done."""
        return f"{PROGRESS}/{self.name}/c.{unit.pair_block}.{unit.layer_block}.0"


@dataclass(frozen=True)
class Layout:
    """The structure and metadata of a store, without values."""

    variables: tuple[Variable, ...]
    coords: Mapping[str, tuple[tuple[str, ...], np.ndarray]]  # includes "metric" and "pair"
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
        """Numbers of metrics and pairs: the shape of `base_metric` and `source_metric`."""
        return len(self.coords["metric"][1]), len(self.coords["pair"][1])


def fixed_key(name: str, pair: int) -> str:
    """Return the key of the file with a pair's values of one of `FIXED`."""
    return f"{name}/c.0.{pair}"


def references_key(pair: int) -> str:
    """Return the key of a pair's flag, which holds the digests of its two `FIXED` files."""
    return f"{PROGRESS}/{REFERENCES}/c.{pair}.0"


def layout_files(layout: Layout) -> dict[str, bytes]:
    """Return the files (key -> content) of a store without values, in the order of writing.

    The root group comes first: the process that writes it owns the address. `COMPLETE` comes last.
    """
    files: dict[str, Any] = {}
    attrs = flat_attributes(layout.attrs)
    attrs[FORMAT_KEY] = FORMAT
    # xarray recognises coordinates named like their dimension; this attribute lists the others
    others = [name for name, (dims, _) in layout.coords.items() if tuple(dims) != (name,)]
    if others:
        attrs["coordinates"] = " ".join(others)
    packed: Any = {"compressors": _ZSTD, "chunk_key_encoding": _FLAT}
    values_of_runs: Any = {"dtype": "float32", "fill_value": np.nan, **packed}
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
                **packed,
            )
            array[...] = values.astype(object) if text else values
        for variable in layout.variables:
            root.create_array(
                variable.name,
                shape=variable.shape,
                chunks=_inner_chunks(variable.shard),
                shards=variable.shard,
                dimension_names=variable.dims,
                attributes=dict(variable.attrs),
                **values_of_runs,
            )
        for name in FIXED:
            root.create_array(
                name,
                shape=layout.fixed_shape,
                chunks=(layout.fixed_shape[0], 1),
                dimension_names=("metric", "pair"),
                attributes={"long_name": f"metric of the unpatched {name.split('_')[0]} run"},
                **values_of_runs,
            )
        names = {"coords": list(layout.coords), "variables": [v.name for v in layout.variables]}
        progress = root.create_group(PROGRESS, attributes=names)
        for variable in layout.variables:
            _create_flags(progress, variable.name, variable.blocks, SEAL_BYTES)
        _create_flags(progress, REFERENCES, layout.fixed_shape[1:], len(FIXED) * SEAL_BYTES)
    order = sorted(files, key=lambda key: (key != "zarr.json", key == COMPLETE))
    return with_digests({key: settled(key, files[key].to_bytes()) for key in order})


def _create_flags(progress: zarr.Group, name: str, shape: tuple[int, ...], size: int) -> None:
    """Create an array whose chunks are a variable's flags: `size` bytes each, uncompressed."""
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
    """Return `files` with their digests added to the attributes of `COMPLETE`."""
    complete = json.loads(files[COMPLETE])
    complete.setdefault("attributes", {})[DIGESTS] = {
        key: digest_of(data) for key, data in sorted(files.items()) if key != COMPLETE
    }
    return {**files, COMPLETE: json.dumps(complete, indent=2).encode()}


def group_of(files: Mapping[str, bytes]) -> zarr.Group:
    """Return the Zarr group that `files` form, read-only."""
    memory = MemoryStore({key: Buffer.from_bytes(data) for key, data in files.items()})
    return zarr.open_group(memory, mode="r", zarr_format=3, use_consolidated=False)


def first_difference(mine: zarr.Group, theirs: zarr.Group) -> str | None:
    """Describe the first difference between two layouts; None if they are equal.

    Attributes come first, then coordinates, then variables.
    """
    return next(_group_differences(mine, theirs), None)


class Encoder:
    """Encodes a block of values as the bytes of its file, through a Zarr array in memory."""

    def __init__(self, metadata: bytes) -> None:
        """`metadata`: the array's `zarr.json`."""
        self._files: dict[str, Any] = {"zarr.json": Buffer.from_bytes(metadata)}
        self._lock = threading.Lock()
        # write a file for an all-NaN block too; this is a setting of the open array, not stored
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._array = zarr.open_array(MemoryStore(self._files), mode="r+")

    def encode(self, where: tuple[slice, ...], values: np.ndarray) -> bytes:
        """Return the file of the chunk or shard that `where` covers exactly."""
        with self._lock:
            self._array[where] = values
            (key,) = self._files.keys() - {"zarr.json"}  # fails if `where` covers several
            data: bytes = self._files.pop(key).to_bytes()
        return data


# one folder per array: each additional folder of a file would cost one more fsync
_FLAT: Any = {"name": "default", "separator": "."}
_ZSTD = ZstdCodec(level=3, checksum=True)  # the checksum detects corrupted bytes


def settled(key: str, data: bytes) -> bytes:
    """Return metadata in a form that is equal for all versions of zarr; other files unchanged."""
    if not key.endswith("zarr.json"):
        return data
    metadata = json.loads(data)
    if metadata.get("consolidated_metadata", 0) is None:  # zarr 3.1.3 writes an explicit null
        del metadata["consolidated_metadata"]
    return json.dumps(metadata, indent=2).encode()


def _inner_chunks(shard: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a shard's equal parts, about `INNER_BYTES` each, cut along first axes."""
    inner = list(shard)
    for axis, size in enumerate(shard):
        least = -(-4 * math.prod(inner) // INNER_BYTES)
        parts = min(n for n in range(1, size + 1) if size % n == 0 and n >= min(least, size))
        inner[axis] = size // parts
    return tuple(inner)


def _group_differences(mine: zarr.Group, theirs: zarr.Group) -> Iterator[str]:
    yield from attribute_differences(dict(mine.attrs), dict(theirs.attrs))
    kinds, their_kinds = _array_names(mine), _array_names(theirs)
    for name in dict.fromkeys([*kinds, *their_kinds]):
        if name not in kinds or name not in their_kinds:
            yield f"array {name} is only in {'this run' if name in kinds else 'the store'}"
            continue
        left, right = mine[name], theirs[name]
        yield from differences(name, _form(left), _form(right))
        if kinds[name] == "coords":
            a, b = _objects(left), _objects(right)
            for index in np.argwhere(a != b)[:1]:
                where = ", ".join(map(str, index))
                yield differ(f"{name}[{where}]", a[tuple(index)], b[tuple(index)])


def _array_names(root: zarr.Group) -> dict[str, str]:
    """Return array name -> kind (coords, variables or fixed) for all arrays of a store."""
    names: Any = root[PROGRESS].attrs
    kinds = {"coords": names["coords"], "variables": names["variables"], "fixed": FIXED}
    return {name: kind for kind, members in kinds.items() for name in members}


def _objects(array: Any) -> np.ndarray:
    return np.asarray(array[...]).astype(object)


def _form(array: Any) -> dict[str, Any]:
    """Return the properties in which arrays of the same run must agree."""
    return {
        "dims": array.metadata.dimension_names,
        "shape": array.shape,
        "dtype": str(array.dtype),
        "unit": array.shards,
        "attrs": dict(array.attrs),
    }
