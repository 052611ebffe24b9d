"""The interface of a storage: keys such as `tokens/ab12/manifest.json` under a root, and its
errors."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.tables import read_table
from raymill.errors import UserError

HF = "hf://"
"""Scheme of the Hugging Face Hub."""


class StorageError(UserError):
    """A location cannot be used as asked: the text names it, the reason and the remedy."""


class NotFoundError(StorageError):
    """Nothing is stored under the key."""


class AlreadyExistsError(StorageError):
    """A write with `if_absent` found something stored under the key."""


class ConflictError(StorageError):
    """A write or delete with `if_version` found another version under the key, or nothing."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored file; `version` (modification time in ns, or an entity tag) changes with its
    bytes."""

    key: str
    size: int
    version: str
    has_bytes: bool = True  # unlike a pipe, a socket, a device, and a link that leads nowhere


Entries = list[Entry]


class Storage(ABC):
    """A root for keys. It is picklable, and touches neither disk nor network until it is used."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """Absolute: a plain path for a local folder, else s3://bucket/prefix or hf://…@revision"""

    @abstractmethod
    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """Returns bytes [start, end) of the file, by default all. Raises `NotFoundError`."""

    @abstractmethod
    def write_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        """Stores all of `data` or nothing, durably, and returns the version, which is new at each
        write.

        `if_absent` only creates, or raises `AlreadyExistsError`. `if_version` only replaces that
        version, or raises `ConflictError`. Of several such writes at once, one succeeds.
        """

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yields the files whose key starts with `prefix`, in the order of their keys, without
        holding all of them."""

    def list(self, prefix: str = "") -> Entries:
        return [*self.entries(prefix)]

    @abstractmethod
    def stat(self, key: str) -> Entry | None:
        """Returns a file's size and version; None if nothing is stored under the key."""

    @abstractmethod
    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """Removes the file if it exists; with `if_version` only that version, or raises
        `ConflictError`."""

    @abstractmethod
    def open(self, key: str, *, listed: Entry | None = None) -> BinaryIO:
        """Returns a seekable, buffered reader. Raises `NotFoundError`.

        With the size and version that a listing gave, no other version is read: this, or a read,
        raises `ConflictError`. In S3 that saves a request.
        """

    @abstractmethod
    def upload_file(self, source: Path, key: str) -> None:
        """Stores a file of any size under the key, all of it or nothing, durably."""

    def download_file(self, key: str, target: Path) -> None:
        """Copies what the key holds to a local file. Raises `NotFoundError`."""
        with self.open(key) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 8 << 20)

    def local_path(self, key: str) -> Path | None:
        """Returns the file's path on this machine, for memory maps; None if it is elsewhere."""
        return None

    @abstractmethod
    def child(self, key: str) -> "Storage":
        """Returns the storage rooted at the folder `key`."""

    def abort_uploads(self) -> None:  # noqa: B027 (not each storage keeps any)
        """Frees what unfinished uploads below this root hold, of writers that were killed above all;
        an upload that still goes on fails."""

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def find_bytes(self, key: str) -> bytes | None:
        """Returns all bytes of the file; None if nothing is stored under the key."""
        try:
            return self.read_bytes(key)
        except NotFoundError:
            return None

    def upload_folder(self, local: Path, key: str, *, last: str | None = None) -> None:
        """Copies a folder's files under `key`, the one called `last` (a manifest) after all
        others."""
        folder = self.child(key)
        names = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (name == last, name)):
            folder.upload_file(local / name, name)

    def download_folder(self, key: str, local: Path, *, last: str | None = None) -> None:
        """Copies the files under `key` into a folder. Raises `NotFoundError` if there are none."""
        folder = self.child(key)
        names = [entry.key for entry in folder.list()]
        if not names:
            raise NotFoundError(f"{folder.uri} is empty or does not exist; check the location")
        for name in sorted(names, key=lambda name: (name == last, name)):
            target = local / checked_key(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.download_file(name, target)


def checked_key(key: str) -> str:
    """Returns the key, refusing one that leaves its root: manifests that others wrote hold keys
    too."""
    if key.startswith("/") or ".." in key.split("/"):
        raise StorageError(f"the key {key!r} leaves its folder; keys are relative and hold no '..'")
    return key


def join_uri(folder: str, key: str) -> str:
    return f"{folder.rstrip('/')}/{key}" if key else folder


def reason_of(store: str, error: BaseException | None, *, code: str | None, host: str) -> str:
    """Returns in words why a store failed: by the kind of the error, or else by the code of its
    answer."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    names = [*kinds, code, "any other answer"] if code else [*kinds, "any other failure"]
    table = read_table(__file__, "reasons")[store]
    reasons: dict[str, str] = {name: entry["reason"] for entry in table for name in entry["of"]}
    reason = next(reasons[name] for name in names if name in reasons)
    return reason.format(code=code or kinds[0], host=host)
