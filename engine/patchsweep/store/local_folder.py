"""A folder on a disk.

A file is on the platter when `put` returns: written under a `*.partial` name, synced, renamed,
and the directory synced.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from patchsweep.errors import StoreError
from patchsweep.store.folder import PARTIAL, Folder
from patchsweep.store.process import is_gone, process_name

_COUNTER = itertools.count()  # no two partial files of this process have one name
PARTIAL_AGE_S = 3600.0  # after this long, another machine's partial file is taken for a leftover


class LocalFolder(Folder):
    """A folder on a disk of this machine, or on a file system that is mounted here."""

    appends = True

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = Path(os.path.abspath(path))
        self.shown = str(path)
        self._sync = sync
        self._identity: tuple[int, int] | None = None  # device and inode when first written to

    def beside(self, suffix: str) -> LocalFolder:
        found = LocalFolder(self.path.with_name(self.path.name + suffix), sync=False)
        found.shown = self.shown + suffix
        return found

    def make(self) -> None:
        with self.guard():
            self._make(self.path)

    def check(self) -> None:
        with self.guard():
            self._check_place()

    def read(self, key: str) -> bytes | None:
        with self.guard():
            try:
                return (self.path / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def exists(self, key: str) -> bool:
        return (self.path / key).is_file()

    def put(self, key: str, data: bytes) -> None:
        with self.guard(), self._written(key, data) as (partial, path):
            os.replace(partial, path)

    def put_new(self, key: str, data: bytes) -> bool:
        if (there := self.read(key)) is not None:
            return there == data
        with self.guard(), self._written(key, data) as (partial, path):
            try:
                os.link(partial, path)
            except FileExistsError:
                return path.read_bytes() == data
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                # a file system without hard links: two writers of one key can meet right here
                os.replace(partial, path)
        return True

    def append(self, key: str, so_far: bytes, line: bytes) -> None:
        path = self.path / key
        with self.guard():
            self._make(path.parent)
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(handle, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            finally:
                os.close(handle)

    def delete(self, key: str) -> None:
        with self.guard():
            (self.path / key).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[str]:
        found = []
        with self.guard():
            for folder, _, names in os.walk(self.path / prefix, onerror=_unless_missing):
                base = Path(folder).relative_to(self.path)
                found += [(base / name).as_posix() for name in names]
        return sorted(found)

    def is_empty(self) -> bool:
        with self.guard():
            try:
                return all(path.name.endswith(PARTIAL) for path in self.path.iterdir())
            except FileNotFoundError:
                return True

    def modified(self, key: str) -> float | None:
        with self.guard():
            try:
                return (self.path / key).stat().st_mtime
            except FileNotFoundError:
                return None

    def zarr_store(self) -> ZarrStore:
        return LocalStore(self.path, read_only=True)

    def free_bytes(self) -> int | None:
        place = next(p for p in (self.path, *self.path.parents) if p.exists())
        with self.guard():
            return shutil.disk_usage(place).free

    def sweep(self) -> None:
        with self.guard():
            for key in self.list():
                path = self.path / key
                if not key.endswith(PARTIAL):
                    continue
                with suppress(FileNotFoundError):  # its writer has just finished
                    age = time.time() - path.stat().st_mtime
                    if is_gone(_writer(path.name)) or age > PARTIAL_AGE_S:
                        path.unlink()

    def sweep_file(self, key: str) -> None:
        path = self.path / key
        with self.guard():
            for partial in path.parent.glob(f"{path.name}~*{PARTIAL}"):
                partial.unlink(missing_ok=True)

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """A synced partial file that holds `data`, and the path where it belongs."""
        path = self.path / key
        self._check_place()
        self._make(path.parent, below=self.path)
        mark = f"~{process_name()}~{next(_COUNTER)}{PARTIAL}"
        partial = path.with_name(path.name + mark)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                if self._sync:
                    file.flush()
                    os.fsync(file.fileno())
            yield partial, path
        finally:
            with suppress(OSError):  # gone if it was renamed
                partial.unlink()
        self._sync_folder(path.parent)

    def _check_place(self) -> None:
        """Refuse to work where the store's disk has been replaced by its empty mount point."""
        found = os.stat(self.path)
        identity = (found.st_dev, found.st_ino)
        if self._identity is None:
            self._identity = identity
        elif self._identity != identity:
            raise OSError(errno.ENODEV, "another folder lies there now")

    def _make(self, path: Path, below: Path | None = None) -> None:
        """Make `path` and its parents, durably; none above `below`."""
        if path.is_dir() or path == below:
            return
        self._make(path.parent, below)
        with suppress(FileExistsError):
            path.mkdir()
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(path))
        self._sync_folder(path.parent)

    def _sync_folder(self, path: Path) -> None:
        if not self._sync:
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such
                raise
        finally:
            os.close(handle)

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(_explain(self, error)) from error


def _explain(folder: LocalFolder, error: OSError) -> str:
    said = f"{folder.shown}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left for the store ({said}); free some, then run the same command "
            "again: finished units are kept"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"the store must be readable and writable ({said}); mend its permissions or give "
            "another path, then run the same command again: finished units are kept"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a store is a folder ({said}); give a path where none of its parts is a file"
    return (
        f"the store's disk must stay in reach ({said}); mount it again, then run the same "
        "command again: finished units are kept"
    )


def _writer(partial: str) -> str:
    """The process that a partial file's name tells of; another program's file tells of none."""
    parts = partial.split("~")
    return parts[1] if len(parts) == 3 else ""


def _unless_missing(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error
