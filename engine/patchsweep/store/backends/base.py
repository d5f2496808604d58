"""The interface of a folder of files, for the store, its leases and its journal.

Writes are atomic. No message shows a credential (see `credentials`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

PARTIAL = ".partial"  # suffix of a file that is still being written
NOT_A_FILE = -1  # size of links, pipes and the like


class Folder(ABC):
    """A folder whose files have keys such as `z/c/0/1`."""

    shown: str  # the address without credentials
    appends: bool  # whether `append` writes only the new line, not the whole file

    @abstractmethod
    def beside(self, suffix: str) -> Folder:
        """Return the folder called `<this one><suffix>`, without fsync (`sync=False`)."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raise a StoreError if the folder cannot be written; leaves nothing behind."""

    @abstractmethod
    def make(self) -> None:
        """Create the folder and its parents if they are missing."""

    @abstractmethod
    def check(self) -> None:
        """Raise a StoreError if another folder has replaced it since the first check or put."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the file's content; None if it is missing, or is a link or a pipe."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write or replace a file atomically."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Create a file; False if it exists already with content other than `data`."""

    @abstractmethod
    def append(self, key: str, so_far: bytes, line: bytes) -> None:
        """Append `line` to a file that only this process writes; `so_far` is its content."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a file if it exists."""

    def delete_all(self) -> None:
        """Delete the folder and all its files, if it exists."""
        for key in self.list():
            self.delete(key)

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """Yield `read(key)` for `keys` in order, reading at most a few files ahead."""
        return map(self.read, keys)

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int | None]:
        """Return key -> bytes for all files in the folder `prefix`; empty if it does not exist.

        None if the storage reports no size, `NOT_A_FILE` for links, pipes and the like.
        """

    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted keys of all files in folder `prefix`; empty if it does not exist."""
        return sorted(self.sizes(prefix))

    @abstractmethod
    def modified(self, key: str) -> float | None:
        """Return the unix time of the file's last write by the storage's clock; None: unknown."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether the folder is missing or holds nothing but partial files."""

    @abstractmethod
    def guard(self) -> AbstractContextManager[None]:
        """Convert storage errors inside the block into StoreErrors that say what to do."""

    def free_bytes(self) -> int | None:
        """Return the free bytes; None if the storage does not report them."""
        return None

    @abstractmethod
    def sweep(self) -> None:
        """Delete the partial files of killed processes."""

    @abstractmethod
    def sweep_file(self, key: str) -> None:
        """Delete all partial files of `key`; no other process may be writing it."""

    def exists(self, key: str) -> bool:
        """Whether the file exists."""
        return self.read(key) is not None
