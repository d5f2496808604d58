"""A folder on a disk.

`put` returns when the file is on disk: it writes a `*.partial` file, syncs and renames it, and
syncs the directory.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import NOT_A_FILE, PARTIAL, Folder
from patchsweep.store.backends.process import is_gone, process_name

# do not follow links, nor wait for the writer of a pipe
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_COUNTER = itertools.count()  # makes the names of what this process writes unique
PARTIAL_AGE_S = 3600.0  # age at which another machine's partial file counts as a leftover


class LocalFolder(Folder):
    """A folder on a local or mounted file system.

    The path to the folder may contain links. Links inside the folder are never followed: they
    would let an untrusted store name any file of this machine.
    """

    appends = True

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = Path(os.path.abspath(path))
        self.shown = str(path)
        self._sync = sync
        self._identity: tuple[int, int] | None = None  # device and inode at the first check or put
        self._no_links: set[str] = set()  # subfolders known not to be links

    def beside(self, suffix: str) -> LocalFolder:
        folder = LocalFolder(self.path.with_name(self.path.name + suffix), sync=False)
        folder.shown = self.shown + suffix
        if folder.path.is_symlink():
            raise StoreError(f"{folder.shown} is a link; put a folder there instead")
        return folder

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
                with open(self._at(key), "rb", buffering=0, opener=_opened) as file:
                    return file.readall() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
                    return None
                raise

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
        if (stored := self.read(key)) is not None:
            return stored == data
        with self.guard(), self._written(key, data) as (partial, path):
            try:
                os.link(partial, path)
            except FileExistsError:
                return self.read(key) == data
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                # without hard links this is not exclusive: a rival may write the key just before
                os.replace(partial, path)
        return True

    def put_together(self, files: Mapping[str, bytes]) -> bool:
        """Create the folder with all `files` at once; False if something lies there already.

        They are written and synced in a folder beside it, which is then renamed.
        """
        for leftover in self.path.parent.glob(f"{escape(self.path.name)}~*~*{PARTIAL}"):
            if is_gone(leftover.name.removesuffix(PARTIAL).rsplit("~", 2)[1]):
                shutil.rmtree(leftover, ignore_errors=True)
        partial = LocalFolder(_partial(self.path))
        partial.shown = self.shown
        try:
            partial.make()
            for key, data in files.items():
                partial.put(key, data)
            with self.guard():
                try:
                    partial.path.rename(self.path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    return False
                self._sync_folder(self.path.parent)
        finally:
            shutil.rmtree(partial.path, ignore_errors=True)
        return True

    def append(self, key: str, so_far: bytes, line: bytes) -> None:
        path = self.path / key
        with self.guard():
            self._make(path.parent)
            with open(path, "ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def delete(self, key: str) -> None:
        with self.guard():
            (self.path / key).unlink(missing_ok=True)

    def delete_all(self) -> None:
        with self.guard(), suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    def sizes(self, prefix: str = "") -> dict[str, int | None]:
        sizes: dict[str, int | None] = {}
        folders = [prefix]
        with self.guard():
            self._refuse_links(f"{prefix}/")
            while folders:
                folder = folders.pop()
                with (
                    suppress(FileNotFoundError, NotADirectoryError),
                    os.scandir(self._at(folder)) as entries,
                ):
                    for entry in entries:
                        key = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(key)
                        elif entry.is_file(follow_symlinks=False):
                            with suppress(FileNotFoundError):  # deleted meanwhile
                                sizes[key] = entry.stat(follow_symlinks=False).st_size
                        else:
                            sizes[key] = NOT_A_FILE
        return sizes

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
        """Yield a synced partial file that holds `data`, and the path to move it to."""
        path = self.path / key
        self._check_place()
        self._refuse_links(key)
        self._make(path.parent, below=self.path)
        partial = _partial(path)
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
        """Raise OSError if another folder, such as a bare mount point, has replaced the store's."""
        status = os.stat(self.path)
        identity = (status.st_dev, status.st_ino)
        if self._identity is None:
            self._identity = identity
        elif self._identity != identity:
            raise OSError(errno.ENODEV, "another folder lies there now")

    def _now(self) -> float:
        """Return the time by the file system's clock, which sets the times of all files."""
        probe = _partial(self.path / "now")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _at(self, key: str) -> str:
        return f"{self.path}/{key}"

    def _refuse_links(self, key: str) -> None:
        """Raise StoreError if a folder in `key` is a link."""
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
        """Create `path` and its parents up to `below`, synced to disk."""
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
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not all file systems support it
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
    cause = f"{folder.shown}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left for the store ({cause}); free some, then run the same command "
            "again: finished units are kept"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"the store must be readable and writable ({cause}); mend its permissions or give "
            "another path, then run the same command again: finished units are kept"
        )
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        place = error.filename2 or error.filename
        return f"a folder lies where the store keeps a file ({place}); delete it, then run again"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a store is a folder ({cause}); give a path where none of its parts is a file"
    return (
        f"the store's disk must stay in reach ({cause}); mount it again, then run the same "
        "command again: finished units are kept"
    )


def _opened(path: str, flags: int) -> int:
    return os.open(path, _READ)


def _partial(path: Path) -> Path:
    """Return the place where this process writes what will lie at `path`."""
    return path.with_name(f"{path.name}~{process_name()}~{next(_COUNTER)}{PARTIAL}")


def _writer(partial: str) -> str:
    """Return the process in a partial file's name; "" for another program's file."""
    parts = partial.split("~")
    return parts[1] if len(parts) == 3 else ""
