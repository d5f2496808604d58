"""A folder of whole files, wherever it lies: what the store, its leases and its journal need.

A file is put at once or not at all. No credential is ever shown (see `credentials`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

PARTIAL = ".partial"  # how the name of a file ends that is not whole yet
NOT_A_FILE = -1  # in place of a size


class Folder(ABC):
    """Whole files under keys such as `z/c/0/1`."""

    shown: str  # the address, fit for people to see
    appends: bool  # whether `append` costs the new line alone, not the whole file again

    @abstractmethod
    def beside(self, suffix: str) -> Folder:
        """The folder called `<this one><suffix>`; its files are not waited for (`sync=False`)."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raise a StoreError if no file can be put here; leaves nothing behind."""

    @abstractmethod
    def make(self) -> None:
        """Make the folder if it is missing, parents included."""

    @abstractmethod
    def check(self) -> None:
        """Raise a StoreError if the folder is no longer what it was at the first check or put."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The file's content; None if there is no such file, or a link or pipe in its place."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write or replace a whole file."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write a file that is not there yet. False if one is, with other content than `data`."""

    @abstractmethod
    def append(self, key: str, so_far: bytes, line: bytes) -> None:
        """Add `line` to a file of which this process alone has written everything (`so_far`)."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; nothing happens if there is none."""

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """What `read` gives for each of `keys`, in their order, a few files ahead at most."""
        return map(self.read, keys)

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int | None]:
        """Bytes of each file in the folder `prefix`, by key; empty if there is no such folder.

        None where the storage does not tell, `NOT_A_FILE` for links, pipes and the like.
        """

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all files in the folder `prefix`, sorted; empty if there is no such folder."""
        return sorted(self.sizes(prefix))

    @abstractmethod
    def modified(self, key: str) -> float | None:
        """Unix time at which the file was last put, by the clock of the storage; None: unknown."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing lies there, partial files aside."""

    @abstractmethod
    def guard(self) -> AbstractContextManager[None]:
        """Turns what goes wrong inside with the storage into a StoreError that says what to do."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where the storage does not tell."""
        return None

    @abstractmethod
    def sweep(self) -> None:
        """Delete partial files that killed processes left behind."""

    @abstractmethod
    def sweep_file(self, key: str) -> None:
        """Delete all partial files of `key`, which nobody else may write now."""

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return self.read(key) is not None
