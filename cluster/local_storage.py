"""Storage in a folder of this machine or of a file system that all nodes mount."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.storage_interface import (
    AlreadyExistsError,
    Entries,
    Entry,
    NotFoundError,
    Storage,
    StorageError,
    checked_key,
)

_TEMPORARY = ".partial-"
"""Files being written are called `.partial-<random>` beside their target; no listing shows them."""


@dataclass(frozen=True)
class LocalStorage(Storage):
    """Files below a folder, which the first write makes."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def local_path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def child(self, key: str) -> "LocalStorage":
        return LocalStorage(self.local_path(key))

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        with self.open(key) as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)

    def write_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        with self._replacing(key, if_absent=if_absent) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def _replacing(self, key: str, *, if_absent: bool = False) -> Iterator[Path]:
        """A temporary file that takes the key's name, durably and at once, when the block ends well."""
        path = self.local_path(key)
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        with _explained_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                _fsync(temporary)
                if if_absent:
                    _link(temporary, path)
                else:
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _fsync(path.parent)

    def list(self, prefix: str = "") -> Entries:
        folder = prefix.rpartition("/")[0]
        below = LocalStorage(self.local_path(folder)).walk()
        entries = [
            Entry(f"{folder}/{entry.key}" if folder else entry.key, entry.size, entry.version) for entry in below
        ]
        return [entry for entry in entries if entry.key.startswith(prefix)]

    def walk(self, *, max_depth: int | None = None) -> Entries:
        """Regular files at most `max_depth` folders down. Links to folders may loop and are not followed."""
        entries = []
        for folder, folders, names in os.walk(self.root):
            relative = Path(folder).relative_to(self.root)
            if max_depth is not None and len(relative.parts) >= max_depth:
                folders.clear()
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not name.startswith(_TEMPORARY):
                    entries.append(_entry(path, (relative / name).as_posix()))
        return sorted(entries, key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        path = self.local_path(key)
        with _explained_errors(path):
            return _entry(path, key) if path.is_file() else None

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with _explained_errors(path):
            path.unlink(missing_ok=True)

    def open(self, key: str) -> BinaryIO:
        path = self.local_path(key)
        with _explained_errors(path):
            return path.open("rb")

    def upload_file(self, source: Path, key: str) -> None:
        with self._replacing(key) as temporary:
            shutil.copyfile(source, temporary)

    def download_file(self, key: str, target: Path) -> None:
        path = self.local_path(key)
        with _explained_errors(path):
            shutil.copyfile(path, target)


@contextmanager
def _explained_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; check the path") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{path}: {reason}; check the path, its rights and the space left") from error


def _link(source: Path, target: Path) -> None:
    """Unlike `Path.replace`, fails where there is a file already."""
    try:
        os.link(source, target)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{target} exists already") from error


def _entry(path: Path, key: str) -> Entry:
    stat = path.stat()
    return Entry(key, stat.st_size, str(stat.st_mtime_ns))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
