"""What a store says of itself, read as data and checked.

A store may come from anybody, and may have rotted. Nothing in it is imported, called or resolved:
attributes are JSON and stay JSON. Zarr's metadata can name codecs and data types of any installed
package, and older formats can name pickle; so it must say what this package writes (`_CODECS`,
`_TYPES`) before zarr gets to see it. Names must be names, so that no key leads out of the store.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
KIND = "kind"  # root attribute of an analysis' results; a sweep has none
# what to do about damage; results of an analysis are put whole, and not mended in part
MEND = "run the command that wrote the store again: it mends that, or says what to do"
DELETE = "delete the store and run its command again"

_CODECS = {"bytes", "vlen-utf8", "zstd", "sharding_indexed", "crc32c"}
_TYPES = {"bool", "string", *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64))}
_TYPES |= {"float16", "float32", "float64"}
_NAME = re.compile(r"[A-Za-z_]\w*")
_KEY = re.compile(r"(\w[\w.]*/)*\w[\w.]*")  # no empty part, no part that begins with a dot
_MOST_UNITS = 10_000_000


@dataclass(frozen=True)
class Contents:
    """The files that a store has from the start: metadata and coordinates."""

    shown: str  # the store's address, fit for people to see
    attrs: dict[str, Any]  # of the root
    names: dict[str, Any]  # attributes of `COMPLETE`
    files: dict[str, bytes]  # by key; those that are sound
    problems: tuple[str, ...]  # a line for each file that is not

    @property
    def identity(self) -> bytes:
        """What the store's digests are bound to."""
        return bytes.fromhex(digest_of(self.files[COMPLETE]))

    @property
    def kind(self) -> str | None:
        """Of which analysis the results are, such as `lens`; None: of a sweep."""
        kind = self.attrs.get(KIND)
        return None if kind is None else str(kind)

    @property
    def is_sweep(self) -> bool:
        """Whether it was written unit by unit; else at once."""
        return "variables" in self.names

    def group(self) -> zarr.Group:
        """The Zarr group that the files make up, to read.

        Raises:
            DamagedError: a file is not as it was written.
        """
        if self.problems:
            raise damaged(self.shown, self.problems[0], MEND if self.is_sweep else DELETE)
        sizes: dict[str, int] = {}
        for key, data in self.files.items():
            if not key.endswith(ROOT):
                continue
            found = self.metadata(key, data)
            if key.startswith(f"{PROGRESS}/"):
                continue
            dims, shape = found.get("dimension_names", []), found.get("shape", [])
            if len(dims) != len(shape):
                raise self._strange(key, f"dims {dims} with shape {shape}")
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise self._strange(key, f"{size} along {dim}, where others have {sizes[dim]}")
        return group_of(self.files)

    def metadata(self, key: str, data: bytes) -> dict[str, Any]:
        """A `zarr.json` that names nothing but what this package writes.

        Raises:
            StoreError: it names something else.
        """
        found = parse(data)
        wrong = "it is no JSON object" if found is None else _strange(found)
        if wrong:
            raise self._strange(key, wrong)
        assert found is not None
        return found

    def variables(self) -> dict[str, Variable]:
        """A sweep's variables, in its layout's order."""
        return {name: self._variable(name) for name in self._listed("variables")}

    def coords(self) -> list[str]:
        """Names of a sweep's coordinates."""
        return self._listed("coords")

    def form(self, name: str) -> ShardForm:
        """How the files of a variable, or of one of `FIXED`, are decoded."""
        found = self._array(name)
        shard = tuple(found["chunk_grid"]["configuration"]["chunk_shape"])
        inner = found["codecs"][0].get("configuration", {}).get("chunk_shape")
        return ShardForm(shard, None if name in FIXED else tuple(inner))

    def fixed_shape(self) -> tuple[int, int]:
        """Metrics and pairs."""
        n_metrics, n_pairs = self._array(FIXED[0])["shape"]
        return n_metrics, n_pairs

    def _variable(self, name: str) -> Variable:
        found = self._array(name)
        dims, shape = tuple(found["dimension_names"]), tuple(found["shape"])
        cut = dict(zip(dims, found["chunk_grid"]["configuration"]["chunk_shape"], strict=True))
        unit = (cut["pair"], cut.get("layer", 1))
        variable = Variable(name, dims, shape, unit, dict(found["attributes"]))
        if variable.n_units > _MOST_UNITS:
            raise self._strange(f"{name}/{ROOT}", f"{variable.n_units:,} units")
        return variable

    def _array(self, name: str) -> dict[str, Any]:
        """Metadata of a variable, or of one of `FIXED`, that are cut and packed as here."""
        key = f"{name}/{ROOT}"
        found = self.metadata(key, self.files.get(key, b""))
        try:
            wrong = _strange_values(found, whole=name in FIXED)
        except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise self._strange(key, wrong)
        return found

    def _listed(self, which: str) -> list[str]:
        names = self.names.get(which)
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _NAME.fullmatch(name) for name in names
        ):
            raise self._strange(COMPLETE, f"its {which} are no names")
        return names

    def _strange(self, key: str, what: str) -> StoreError:
        return StoreError(
            f"{self.shown} is not as patchsweep writes stores: {key}: {what[:200]}; do not trust it"
        )


def printable(text: str) -> str:
    """Text of anybody's, fit for a terminal: it moves no cursor and turns nothing round."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def told(shown: str) -> Iterator[None]:
    """Inside, values are read as what a store says that they are.

    It may say anything, and nobody expects everything: an error that comes of it is told as one.
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


def damaged(shown: str, what: str, remedy: str = MEND) -> DamagedError:
    """The error that says `what` is damaged in the store at `shown`."""
    return DamagedError(f"{shown} is damaged: {what}; {remedy}")


def parse(data: bytes | None) -> dict[str, Any] | None:
    """The JSON object that `data` is; None if it is none."""
    try:
        found = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_root(folder: Folder) -> dict[str, Any] | None:
    """The attributes of the store in `folder`; None if there is no Zarr group.

    Raises:
        DamagedError: it was a store.
        StoreError: it is none of ours, or of a format that this version does not know.
    """
    data = folder.read(ROOT)
    found = parse(data)
    attrs = found.get("attributes") if found else None
    if isinstance(attrs, dict) and attrs.get(FORMAT_KEY) == FORMAT:
        return attrs
    wanted = digests_of(folder.read(COMPLETE)).get(ROOT)
    if wanted is not None and wanted != digest_of(data or b""):
        what = "is missing" if data is None else "is not as it was written"
        raise damaged(folder.shown, f"{ROOT} {what}")
    if data is None:
        return None
    if isinstance(attrs, dict) and {KIND, "patchsweep_version"} <= attrs.keys():
        attrs.setdefault(FORMAT_KEY, 1)  # analyses wrote none before format 2
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
    """File -> digest, as `COMPLETE` with this content says; empty if it says nothing."""
    attrs = (parse(complete) or {}).get("attributes")
    digests = attrs.get(DIGESTS) if isinstance(attrs, dict) else None
    return digests if isinstance(digests, dict) and ROOT in digests else {}


def read_contents(folder: Folder) -> Contents:
    """All files that the store in `folder` has from the start, each beside its digest.

    Raises:
        DamagedError: the list of these files is damaged.
        StoreError: there is no store, or one of another program, or its making was cut off.
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
        cut = " (or the store was cut off while it was made)" if complete is None else ""
        what = "is missing" if complete is None else "cannot be read"
        raise damaged(folder.shown, f"{COMPLETE} {what}{cut}")
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
    return Contents(folder.shown, attrs, names, files, tuple(problems))


def _strange(found: Mapping[str, Any]) -> str:
    """What in a `zarr.json` this package never writes; empty if nothing."""
    if found.get("zarr_format") != 3:
        return f"zarr_format is {found.get('zarr_format')!r}, not 3"
    if not isinstance(found.get("attributes", {}), dict):
        return "its attributes are no object"
    if found.get("node_type") == "group":
        extra = set(found) - {"attributes", "zarr_format", "node_type"}
        return f"a group has {', '.join(sorted(extra))}" if extra else ""
    if found.get("node_type") != "array":
        return f"node_type is {found.get('node_type')!r}"
    if str(found.get("data_type")) not in _TYPES:
        return f"data_type is {found.get('data_type')!r}"
    if found.get("storage_transformers"):
        return "it has storage_transformers"
    shape = found.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        return "its shape is no list of lengths"
    names = found.get("dimension_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its dimension_names are no names"
    return _strange_codecs(found.get("codecs"))


def _strange_codecs(codecs: Any) -> str:
    if not isinstance(codecs, list):
        return "its codecs are no list"
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in _CODECS:
            return f"codec {name!r}"
        inside = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        for key in ("codecs", "index_codecs"):
            if key in inside and (wrong := _strange_codecs(inside[key])):
                return wrong
    return ""


def _strange_values(found: Mapping[str, Any], whole: bool) -> str:
    """What in the metadata of values would be decoded wrongly; `whole`: they are not sharded."""
    shape, dims = found["shape"], found["dimension_names"]
    shard = found["chunk_grid"]["configuration"]["chunk_shape"]
    if found["data_type"] != "float32" or found["fill_value"] != "NaN":
        return "its values are no float32 with NaN for what is missing"
    if not len(shape) == len(dims) == len(shard) == len(set(dims)) or "pair" not in dims:
        return f"dims {dims} with shape {shape} and shards {shard}"
    if not all(type(n) is int and 0 < n <= size for n, size in zip(shard, shape, strict=True)):
        return f"shards {shard} in shape {shape}"
    if found["chunk_key_encoding"]["configuration"]["separator"] != ".":
        return "its files have other names"
    packed = found["codecs"]
    if not whole:
        (sharding,) = packed
        form = sharding["configuration"]
        inner, packed = form["chunk_shape"], form["codecs"]
        if form["index_location"] != "end" or len(form["index_codecs"]) != 2:
            return "its shards have another index"
        parts = [n % m for n, m in zip(shard, inner, strict=True)]
        if any(parts) or math.prod(shard) // math.prod(inner) > 2**20:
            return f"inner chunks {inner} in shards {shard}"
    first, second = packed
    if first["name"] != "bytes" or first["configuration"]["endian"] != "little":
        return "its values are no little-endian bytes"
    return "" if second["name"] == "zstd" else "its values are packed in another way"
