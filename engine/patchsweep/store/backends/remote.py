"""A folder in an object store, or behind any other URL that fsspec opens.

Object stores write files atomically. The storage library does retries and backoff, set by its
options.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import Folder
from patchsweep.store.backends.credentials import scrub

AT_ONCE = 64  # files that `read_many` requests together


class RemoteFolder(Folder):
    """A folder behind an fsspec URL."""

    appends = False

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.shown = scrub(url)
        self._url, self._options = url, dict(options)
        # listings are never cached: other processes write at the same time
        self._options.setdefault("use_listings_cache", False)
        try:
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(url, **self._options)
        except Exception as error:  # the protocol is unknown, or its package is missing
            raise StoreError(
                f"a store's URL must be one that fsspec can open; {self.shown!r} is not "
                f"({_said(error)}); install the protocol's package (for S3: patchsweep[s3]) or "
                "give another address"
            ) from None
        self._root = root.rstrip("/")

    def beside(self, suffix: str) -> RemoteFolder:
        return RemoteFolder(self._url + suffix, self._options)

    def make(self) -> None:
        """Do nothing: in object stores folders are prefixes of file names."""

    def check(self) -> None:
        """Do nothing: each request shows whether the storage is reachable."""

    def read(self, key: str) -> bytes | None:
        with self.guard():
            try:
                data: bytes = self._fs.cat_file(self._path(key))
            except (FileNotFoundError, IsADirectoryError):
                return None
            return data

    def exists(self, key: str) -> bool:
        with self.guard():
            return bool(self._fs.exists(self._path(key)))

    def put(self, key: str, data: bytes) -> None:
        with self.guard():
            self._fs.pipe_file(self._path(key), data)

    def put_new(self, key: str, data: bytes) -> bool:
        # storage without conditional puts may ignore the mode, so read first
        if (stored := self.read(key)) is None:
            with self.guard():
                try:
                    self._fs.pipe_file(self._path(key), data, mode="create")
                    return True
                except Exception:
                    stored = self.read(key)
                    if stored is None:  # no rival wrote the file: the put failed
                        raise
        return stored == data  # also true if this put succeeded and its answer was lost

    def append(self, key: str, so_far: bytes, line: bytes) -> None:
        self.put(key, so_far + line)

    def delete(self, key: str) -> None:
        with self.guard(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        rest = iter(keys)
        while chunk := list(itertools.islice(rest, AT_ONCE)):
            paths, ends = [self._path(key) for key in chunk], [None] * len(chunk)
            with self.guard():
                # not `cat`, which reads brackets and stars in a name as a pattern
                answers = self._fs.cat_ranges(paths, ends, ends, on_error="return")
                for answer in answers:
                    if isinstance(answer, FileNotFoundError | IsADirectoryError):
                        continue
                    if isinstance(answer, Exception):
                        raise answer
            yield from (answer if isinstance(answer, bytes) else None for answer in answers)

    def sizes(self, prefix: str = "") -> dict[str, int | None]:
        with self.guard():
            try:
                files = self._fs.find(self._path(prefix), detail=True)
            except FileNotFoundError:
                return {}
        folder, start = f"{self._path(prefix)}/", len(self._root) + 1
        return {p[start:]: info.get("size") for p, info in files.items() if p.startswith(folder)}

    def check_writable(self) -> None:
        probe = f"{self._root}.probe-{uuid.uuid4().hex}"  # beside the folder, which stays empty
        with self.guard():
            self._fs.pipe_file(probe, b"")
            self._fs.rm_file(probe)

    def is_empty(self) -> bool:
        with self.guard():
            try:
                return not self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return True

    def modified(self, key: str) -> float | None:
        with self.guard():
            try:
                return float(self._fs.modified(self._path(key)).timestamp())
            except (FileNotFoundError, NotImplementedError, AttributeError):
                return None

    def sweep(self) -> None:
        """Do nothing: object stores have no partial files."""

    def sweep_file(self, key: str) -> None:
        """Do nothing: object stores have no partial files."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # each storage library has its own error types
            # not chained: the library's traceback may hold credentials
            raise StoreError(
                f"the store must answer, but {self.shown} did not after its library's retries "
                f"({_said(error)}); see to the network and the credentials, then run the same "
                "command again: finished units are kept"
            ) from None


def _said(error: BaseException) -> str:
    return scrub(f"{type(error).__name__}: {error}"[:300])
