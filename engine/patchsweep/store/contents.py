"""Metadata and coordinates of a store, read as data and checked before zarr sees them.

A store may be untrusted or corrupted. Nothing in it is imported, called or resolved: attributes
stay JSON. Zarr's metadata can name codecs and data types of any installed package, and older
formats can name pickle, so only metadata that this package writes (`_CODECS`, `_TYPES`) is passed
on to zarr. Names must be identifiers, so that no key leads out of the store.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import zarr

from patchsweep.errors import DamagedError, PatchsweepError, StoreError
from patchsweep.store.backends.base import Folder
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.digest import digest_of
from patchsweep.store.layout import (
    COMPLETE,
    DIGESTS,
    FIXED,
    FORMAT,
    FORMAT_KEY,
    PROGRESS,
    Variable,
    group_of,
)
from patchsweep.store.shard import ShardForm

ROOT = "zarr.json"
KIND = "kind"  # root attribute of an analysis' results; sweeps lack it
# remedies for damage; results of an analysis are written at once and cannot be repaired in part
MEND = "run the command that wrote the store again: it mends that, or says what to do"
DELETE = "delete the store and run its command again"

_CODECS = {"bytes", "vlen-utf8", "zstd", "sharding_indexed", "crc32c"}
_TYPES = {"bool", "string", *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64))}
_TYPES |= {"float16", "float32", "float64"}
_NAME = re.compile(r"[A-Za-z_]\w*")
_KEY = re.compile(r"(\w[\w.]*/)*\w[\w.]*")  # no part is empty or begins with a dot
_MOST_UNITS = 10_000_000


@dataclass(frozen=True)
class Contents:
    """The files that a store has from its creation: metadata and coordinates."""

    folder: Folder
    attrs: dict[str, Any]  # root attributes
    names: dict[str, Any]  # attributes of `COMPLETE`
    files: dict[str, bytes]  # key -> content, of undamaged files
    problems: tuple[str, ...]  # a line for each damaged file

    @cached_property
    def identity(self) -> bytes:
        """SHA-256 of `COMPLETE`, which every seal of the store covers."""
        return bytes.fromhex(digest_of(self.files[COMPLETE]))

    @property
    def kind(self) -> str | None:
        """The analysis that wrote the results, such as `lens`; None for a sweep."""
        kind = self.attrs.get(KIND)
        return None if kind is None else str(kind)

    @property
    def is_sweep(self) -> bool:
        """Whether a sweep wrote the store, shard by shard; an analysis writes at once."""
        return "variables" in self.names

    def group(self) -> zarr.Group:
        """Return the Zarr group of the files, read-only.

        Raises:
            DamagedError: a file does not match its digest.
            StoreError: the metadata holds something that this package never writes.
        """
        if self.problems:
            raise damaged(self.folder, self.problems[0], MEND if self.is_sweep else DELETE)
        sizes: dict[str, int] = {}
        for key, data in self.files.items():
            if not key.endswith(ROOT):
                continue
            metadata = self.metadata(key, data)
            if key.startswith(f"{PROGRESS}/"):
                continue
            dims, shape = metadata.get("dimension_names", []), metadata.get("shape", [])
            if len(dims) != len(shape):
                raise self._strange(key, f"dims {dims} with shape {shape}")
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise self._strange(key, f"{size} along {dim}, where others have {sizes[dim]}")
        return group_of(self.files)

    def metadata(self, key: str, data: bytes) -> dict[str, Any]:
        """Parse a `zarr.json` and check that it holds only what this package writes.

        Raises:
            StoreError: it holds something else.
        """
        metadata = parse(data)
        if metadata is None:
            raise self._strange(key, "it is no JSON object")
        if problem := _strange(metadata):
            raise self._strange(key, problem)
        return metadata

    @cached_property
    def variables(self) -> dict[str, Variable]:
        """A sweep's variables by name, in the order of its layout."""
        return {name: self._variable(name) for name in self._listed("variables")}

    def coords(self) -> list[str]:
        """Return the names of a sweep's coordinates."""
        return self._listed("coords")

    def form(self, name: str) -> ShardForm:
        """Return the decoder for the files of a variable or of one of `FIXED`."""
        metadata = self._array(name)
        shard = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        inner = metadata["codecs"][0].get("configuration", {}).get("chunk_shape")
        return ShardForm(shard, None if name in FIXED else tuple(inner))

    def fixed_shape(self) -> tuple[int, int]:
        """Return the numbers of metrics and of pairs."""
        n_metrics, n_pairs = self._array(FIXED[0])["shape"]
        return n_metrics, n_pairs

    def _variable(self, name: str) -> Variable:
        metadata = self._array(name)
        dims, shape = tuple(metadata["dimension_names"]), tuple(metadata["shape"])
        cut = dict(zip(dims, metadata["chunk_grid"]["configuration"]["chunk_shape"], strict=True))
        unit = (cut["pair"], cut.get("layer", 1))
        variable = Variable(name, dims, shape, unit, dict(metadata["attributes"]))
        if variable.n_units > _MOST_UNITS:
            raise self._strange(f"{name}/{ROOT}", f"{variable.n_units:,} units")
        return variable

    def _array(self, name: str) -> dict[str, Any]:
        """Return the checked metadata of a variable or of one of `FIXED`."""
        key = f"{name}/{ROOT}"
        metadata = self.metadata(key, self.files.get(key, b""))
        try:
            problem = _strange_values(metadata, whole=name in FIXED)
        except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise self._strange(key, problem)
        return metadata

    def _listed(self, which: str) -> list[str]:
        names = self.names.get(which)
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _NAME.fullmatch(name) for name in names
        ):
            raise self._strange(COMPLETE, f"its {which} are no names")
        return names

    def _strange(self, key: str, what: str) -> StoreError:
        return StoreError(
            f"{self.folder.shown} is not as patchsweep writes stores: {key}: {what[:200]}; do not "
            "trust it"
        )


@contextmanager
def understood(shown: str) -> Iterator[None]:
    """Convert unexpected errors while reading the store `shown` into StoreErrors.

    Untrusted metadata may cause errors of any type.
    """
    try:
        yield
    except PatchsweepError:
        raise
    except Exception as error:
        raise StoreError(
            f"what {shown} holds cannot be understood ({type(error).__name__}: "
            f"{scrub(str(error))[:200]}); `patchsweep verify` says whether it is damaged"
        ) from error


def damaged(folder: Folder, what: str, remedy: str = MEND) -> DamagedError:
    """Return a DamagedError: `what` is damaged in the store in `folder`."""
    return DamagedError(f"{folder.shown} is damaged: {what}; {remedy}")


def parse(data: bytes | None) -> dict[str, Any] | None:
    """Parse a JSON object; None if `data` is not one."""
    try:
        value = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_root(folder: Folder) -> dict[str, Any] | None:
    """Return the root attributes of the store in `folder`; None if there is no Zarr group.

    Raises:
        DamagedError: the root metadata does not match its digest.
        StoreError: patchsweep did not write it, or it has an unknown store format.
    """
    data = folder.read(ROOT)
    root = parse(data)
    attrs = root.get("attributes") if root else None
    if isinstance(attrs, dict) and attrs.get(FORMAT_KEY) == FORMAT:
        return attrs
    recorded = digests_of(folder.read(COMPLETE)).get(ROOT)
    if recorded is not None and recorded != digest_of(data or b""):
        what = "is missing" if data is None else "is not as it was written"
        raise damaged(folder, f"{ROOT} {what}")
    if data is None:
        return None
    if isinstance(attrs, dict) and {KIND, "patchsweep_version"} <= attrs.keys():
        attrs.setdefault(FORMAT_KEY, 1)  # analyses wrote no format before format 2
    if not isinstance(attrs, dict) or FORMAT_KEY not in attrs:
        raise StoreError(
            f"{folder.shown} holds a {ROOT} that this version of patchsweep has not written; give "
            "another path"
        )
    raise StoreError(
        f"{folder.shown} has store format {attrs[FORMAT_KEY]!r}, and this patchsweep reads "
        f"{FORMAT}; xarray.open_zarr reads it as it is, and so does the version that wrote it; "
        "give another path to run again"
    )


def digests_of(complete: bytes | None) -> dict[str, str]:
    """Return file -> digest from the content of `COMPLETE`; empty if it has no digests."""
    attrs = (parse(complete) or {}).get("attributes")
    digests = attrs.get(DIGESTS) if isinstance(attrs, dict) else None
    return digests if isinstance(digests, dict) and ROOT in digests else {}


def read_contents(folder: Folder) -> Contents:
    """Read the metadata and coordinates of the store in `folder`, and check their digests.

    Raises:
        DamagedError: `COMPLETE` is damaged or missing (also if its creation was interrupted).
        StoreError: there is no store, or one of another program.
    """
    attrs = read_root(folder)
    if attrs is None:
        raise StoreError(
            f"there is no store at {folder.shown}; check the address, or start the run that "
            "writes it"
        )
    complete = folder.read(COMPLETE)
    digests = digests_of(complete)
    if complete is None or not digests:
        cause = " (or the store was cut off while it was made)" if complete is None else ""
        what = "is missing" if complete is None else "cannot be read"
        raise damaged(folder, f"{COMPLETE} {what}{cause}")
    names: dict[str, Any] = json.loads(complete)["attributes"]
    for key in digests:
        if not _KEY.fullmatch(key):
            raise StoreError(
                f"{folder.shown} is not as patchsweep writes stores: {COMPLETE} names the file "
                f"{key[:80]!r}; do not trust it"
            )
    files, problems = {}, []
    for key, data in zip(digests, folder.read_many(digests), strict=True):
        if data is None:
            problems.append(f"{key}: is missing, or is no file")
        elif digest_of(data) != digests[key]:
            problems.append(f"{key}: {'is empty' if not data else 'is not as it was written'}")
        else:
            files[key] = data
    files[COMPLETE] = complete
    return Contents(folder, attrs, names, files, tuple(problems))


def _strange(metadata: Mapping[str, Any]) -> str:
    """Describe something in a `zarr.json` that this package never writes; empty if nothing."""
    if metadata.get("zarr_format") != 3:
        return f"zarr_format is {metadata.get('zarr_format')!r}, not 3"
    if not isinstance(metadata.get("attributes", {}), dict):
        return "its attributes are no object"
    if metadata.get("node_type") == "group":
        extra = set(metadata) - {"attributes", "zarr_format", "node_type"}
        return f"a group has {', '.join(sorted(extra))}" if extra else ""
    if metadata.get("node_type") != "array":
        return f"node_type is {metadata.get('node_type')!r}"
    if str(metadata.get("data_type")) not in _TYPES:
        return f"data_type is {metadata.get('data_type')!r}"
    if metadata.get("storage_transformers"):
        return "it has storage_transformers"
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        return "its shape is no list of lengths"
    names = metadata.get("dimension_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its dimension_names are no names"
    return _strange_codecs(metadata.get("codecs"))


def _strange_codecs(codecs: Any) -> str:
    if not isinstance(codecs, list):
        return "its codecs are no list"
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in _CODECS:
            return f"codec {name!r}"
        configuration = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        for key in ("codecs", "index_codecs"):
            if key in configuration and (problem := _strange_codecs(configuration[key])):
                return problem
    return ""


def _strange_values(metadata: Mapping[str, Any], whole: bool) -> str:
    """Describe array metadata that `ShardForm` cannot decode; empty if none. `whole`: unsharded."""
    shape, dims = metadata["shape"], metadata["dimension_names"]
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    if metadata["data_type"] != "float32" or metadata["fill_value"] != "NaN":
        return "its values are no float32 with NaN for what is missing"
    if not len(shape) == len(dims) == len(shard) == len(set(dims)) or "pair" not in dims:
        return f"dims {dims} with shape {shape} and shards {shard}"
    if not all(type(n) is int and 0 < n <= size for n, size in zip(shard, shape, strict=True)):
        return f"shards {shard} in shape {shape}"
    if metadata["chunk_key_encoding"]["configuration"]["separator"] != ".":
        return "its files have other names"
    codecs = metadata["codecs"]
    if not whole:
        (sharding,) = codecs
        configuration = sharding["configuration"]
        inner, codecs = configuration["chunk_shape"], configuration["codecs"]
        if configuration["index_location"] != "end" or len(configuration["index_codecs"]) != 2:
            return "its shards have another index"
        parts = [n % m for n, m in zip(shard, inner, strict=True)]
        if any(parts) or math.prod(shard) // math.prod(inner) > 2**20:
            return f"inner chunks {inner} in shards {shard}"
    first, second = codecs
    if first["name"] != "bytes" or first["configuration"]["endian"] != "little":
        return "its values are no little-endian bytes"
    return "" if second["name"] == "zstd" else "its values are packed in another way"
