"""A folder on a disk.

A file is on the platter when `put` returns: written under a `*.partial` name, synced, renamed,
and the directory synced.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import NOT_A_FILE, PARTIAL, Folder
from patchsweep.store.backends.process import is_gone, process_name

# a link is not followed, and a pipe without a writer is not waited for
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_COUNTER = itertools.count()  # no two partial files of this process have one name
PARTIAL_AGE_S = 3600.0  # after this long, another machine's partial file is taken for a leftover


class LocalFolder(Folder):
    """A folder on a disk of this machine, or on a file system that is mounted here.

    The folder may be reached through links. Inside it, links are never followed: they would let
    somebody else's store name any file of this machine.
    """

    appends = True

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = Path(os.path.abspath(path))
        self.shown = str(path)
        self._sync = sync
        self._identity: tuple[int, int] | None = None  # device and inode when first written to
        self._no_links: set[str] = set()  # folders inside that were looked at

    def beside(self, suffix: str) -> LocalFolder:
        found = LocalFolder(self.path.with_name(self.path.name + suffix), sync=False)
        found.shown = self.shown + suffix
        if found.path.is_symlink():
            raise StoreError(f"{found.shown} is a link; put a folder there instead")
        return found

    def check_writable(self) -> None:
        place = next(p for p in (self.path, *self.path.parents) if os.path.lexists(p))
        with self.guard():
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(place))
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    def make(self) -> None:
        with self.guard():
            self._make(self.path)

    def check(self) -> None:
        with self.guard():
            self._check_place()

    def read(self, key: str) -> bytes | None:
        with self.guard():
            self._refuse_links(key)
            try:
                handle = os.open(self._at(key), _READ)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
                    return None
                raise
            try:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    return None
                data = os.read(handle, found.st_size + 1)
                while more := os.read(handle, 1 << 20) if data else b"":
                    data += more
                return data
            finally:
                os.close(handle)

    def exists(self, key: str) -> bool:
        with self.guard():
            self._refuse_links(key)
            try:
                return stat.S_ISREG(os.lstat(self._at(key)).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

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
                return self.read(key) == data
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

    def sizes(self, prefix: str = "") -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        waiting = [prefix]
        with self.guard():
            self._refuse_links(f"{prefix}/")
            while waiting:
                folder = waiting.pop()
                with (
                    suppress(FileNotFoundError, NotADirectoryError),
                    os.scandir(self._at(folder)) as entries,
                ):
                    for entry in entries:
                        key = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(key)
                        elif entry.is_file(follow_symlinks=False):
                            with suppress(FileNotFoundError):  # deleted meanwhile
                                found[key] = entry.stat(follow_symlinks=False).st_size
                        else:
                            found[key] = NOT_A_FILE
        return found

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

    def free_bytes(self) -> int | None:
        place = next(p for p in (self.path, *self.path.parents) if p.exists())
        with self.guard():
            return shutil.disk_usage(place).free

    def sweep(self) -> None:
        with self.guard():
            partial = [key for key in self.sizes() if key.endswith(PARTIAL)]
            now = self._now() if partial else 0.0
            for key in partial:
                path = self.path / key
                with suppress(FileNotFoundError):  # its writer has just finished
                    age = now - path.lstat().st_mtime
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
        self._refuse_links(key)
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

    def _now(self) -> float:
        """The time by the clock of the file system, which gives others' files theirs too."""
        probe = self.path / f"now~{process_name()}~{next(_COUNTER)}{PARTIAL}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _at(self, key: str) -> str:
        return f"{self.path}/{key}"

    def _refuse_links(self, key: str) -> None:
        """Refuse a key that leads through a link to another folder."""
        folder = key.rpartition("/")[0]
        if folder in self._no_links:
            return
        parts = folder.split("/") if folder else []
        for i in range(1, len(parts) + 1):
            if os.path.islink(self._at("/".join(parts[:i]))):
                raise StoreError(
                    f"{self.shown}/{'/'.join(parts[:i])} is a link, and a store holds its own "
                    "folders; put the folder itself there"
                )
        self._no_links.add(folder)

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
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        place = error.filename2 or error.filename
        return f"a folder lies where the store keeps a file ({place}); delete it, then run again"
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
