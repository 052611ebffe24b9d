"""Storage in a folder, of this machine or of a file system that all nodes mount."""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from cluster.storage import interface
from model.files.durable_files import sync

_TEMPORARY = ".partial-"
"""Prefix of a file that is being written, beside its target; no listing shows it."""

_UPLOADED = f"{_TEMPORARY}upload-"

_LOCK_TIMEOUT_S = 5.0
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class LocalStorage(interface.Storage):
    """Files below a folder, which the first write creates."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def local_path(self, key: str) -> Path:
        return self.root / interface.checked_key(key)

    def child(self, key: str) -> "LocalStorage":
        return LocalStorage(self.local_path(key))

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        with self.open(key) as file:
            file.seek(start)
            return file.read() if end is None else file.read(max(end - start, 0))

    def write_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        return self._store(
            key, lambda path: path.write_bytes(data), if_absent=if_absent, if_version=if_version
        )

    def _store(
        self,
        key: str,
        fill: Callable[[Path], object],
        *,
        prefix: str = _TEMPORARY,
        if_absent: bool = False,
        if_version: str | None = None,
    ) -> str:
        """Fills a temporary file that then takes the key's name, durably and atomically, and
        returns its version."""
        path = self.local_path(key)
        temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}")
        with _explained_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(temporary)
                # The kernel dates files by its tick, up to 10 ms long, so two writes in a row could
                # look the same.
                os.utime(temporary, ns=(time.time_ns(),) * 2)
                sync(temporary)
                with _expected(path, if_version):
                    _date_after(temporary, _version(path))
                    version = str(_version(temporary))
                    if if_absent:
                        os.link(temporary, path)
                    else:
                        temporary.replace(path)
            except FileExistsError as error:
                raise interface.AlreadyExistsError(f"{path} exists already") from error
            finally:
                temporary.unlink(missing_ok=True)
            sync(path.parent)
        return version

    def entries(self, prefix: str = "") -> Iterator[interface.Entry]:
        folder = interface.checked_key(prefix).rpartition("/")[0]
        found = self.walk(f"{folder}/" if folder else "")
        return (entry for entry in found if entry.key.startswith(prefix))

    def walk(
        self, folder: str = "", *, max_depth: int | None = None, names_others: bool = False
    ) -> Iterator[interface.Entry]:
        """Yields the regular files below a folder, a key that ends with a slash, at most
        `max_depth` folders down from the root. Raises `StorageError` for an unreadable folder.
        Pipes, sockets, devices and dangling links hold no bytes. Links to folders may loop and are
        not followed. With `names_others` these are entries too: a link to a folder has a key that
        ends with a slash."""
        try:
            with os.scandir(self.root / folder) as found:
                children = list(found)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise _explain(self.root / folder, error) from error
            return
        # With a folder's slash, the order of names is that of keys.
        names = sorted(child.name + "/" * child.is_dir(follow_symlinks=False) for child in children)
        links = {child.name for child in children if names_others and child.is_symlink()}
        for name in names:
            if name.endswith("/"):
                if max_depth is None or folder.count("/") < max_depth:
                    yield from self.walk(
                        folder + name, max_depth=max_depth, names_others=names_others
                    )
            elif name in links and (self.root / folder / name).is_dir():
                yield interface.Entry(f"{folder}{name}/", 0, "")
            elif not name.startswith(_TEMPORARY):
                path = self.root / folder / name
                if entry := _entry(path, folder + name):
                    yield entry
                elif names_others and os.path.lexists(path):
                    yield interface.Entry(folder + name, 0, "", has_bytes=False)

    def stat(self, key: str) -> interface.Entry | None:
        return _entry(self.local_path(key), key)

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        path = self.local_path(key)
        with _explained_errors(path), _expected(path, if_version):
            path.unlink(missing_ok=True)

    def open(self, key: str, *, listed: interface.Entry | None = None) -> BinaryIO:
        path = self.local_path(key)
        with _explained_errors(path):
            # Without O_NONBLOCK, opening a pipe waits for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stat = os.fstat(descriptor)
            if not S_ISREG(stat.st_mode):
                os.close(descriptor)
                raise interface.StorageError(
                    f"{path} is a folder, a pipe or a device; only regular files can be read"
                )
            if listed and (listed.size, listed.version) != (stat.st_size, str(stat.st_mtime_ns)):
                os.close(descriptor)
                raise interface.ConflictError(f"{path} was changed after it was listed; run again")
            return os.fdopen(descriptor, "rb")

    def upload_file(self, source: Path, key: str) -> None:
        self._store(key, lambda path: shutil.copyfile(source, path), prefix=_UPLOADED)

    def abort_uploads(self) -> None:
        with _explained_errors(self.root):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if name.startswith(_UPLOADED):
                        Path(folder, name).unlink(missing_ok=True)


@contextmanager
def _explained_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: OSError) -> interface.StorageError:
    if isinstance(error, FileNotFoundError):
        return interface.NotFoundError(f"{path} does not exist; check the path")
    reason = (error.strerror or str(error)).lower()
    return interface.StorageError(
        f"{path}: {reason}; check the path, its rights and the space left"
    )


def _entry(path: Path, key: str) -> interface.Entry | None:
    """Returns a regular file's entry, else None."""
    try:
        stat = path.stat()
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise _explain(path, error) from error
    return (
        interface.Entry(key, stat.st_size, str(stat.st_mtime_ns)) if S_ISREG(stat.st_mode) else None
    )


def _version(path: Path) -> int:
    """Returns the modification time in ns; -1 if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def _date_after(path: Path, version: int) -> None:
    """Dates the file after the replaced one, even if the clock went back or the file system rounds
    times."""
    for step_ns in (1, 1000, 1_000_000, 2_000_000_000):
        if _version(path) > version:
            return
        os.utime(path, ns=(version + step_ns,) * 2)


@contextmanager
def _expected(path: Path, if_version: str | None) -> Iterator[None]:
    """Checks that the file has the version, and keeps other conditional writers out of the
    block."""
    if if_version is None:
        yield
        return
    lock = path.with_name(f"{_TEMPORARY}lock-{path.name}")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise interface.StorageError(
                        f"{lock} is locked for over {_LOCK_TIMEOUT_S} s; is a process stopped?"
                    ) from None
            time.sleep(0.002)
        if str(_version(path)) != if_version:
            raise interface.ConflictError(f"{path} was changed or removed by another process")
        yield
    finally:
        os.close(descriptor)  # unlocks; the lock file stays, as others may wait for it
