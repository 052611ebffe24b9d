"""`raymill storage check`: whether a storage does all that runs ask of it, and in words what is wrong if not.

Tried with an object of its own below the URI, which is removed again.
"""

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.interface import HF, AlreadyExistsError, ConflictError, Storage, StorageError
from cluster.storage.uris import open_storage

_CONTENT, _OTHER = bytes(range(256)), b"other"
_UNCONDITIONAL = (
    "the store takes {what} without looking at its condition, so two writers could both believe to be the only one; "
    "use one with conditional writes: AWS S3, MinIO, Ceph, or a folder"
)


@dataclass(frozen=True)
class StorageCheck:
    """One thing that was tried; `problem` is empty where it went well."""

    name: str
    problem: str = ""


class _RefusedError(Exception):
    """What a step found, in words."""


def check_storage(uri: str) -> list[StorageCheck]:
    """What was tried, in order, up to the first thing that did not go well. Raises `StorageError` for a wrong URI."""
    if uri.startswith(HF):
        return [StorageCheck("write", f"{uri}: the Hugging Face Hub can only be read; name a folder or s3://")]
    storage, folder = open_storage(uri), f"raymill-check-{secrets.token_hex(8)}"
    key, made = f"{folder}/probe", _first_missing(storage.local_path(folder))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("list", lambda: _list(storage, folder)),
        ("write", lambda: _write(storage, key)),
        ("read", lambda: _read(storage, key)),
        ("create only once", lambda: _create_once(storage, key)),
        ("replace only a known version", lambda: _replace_known(storage, key)),
        ("delete", lambda: _delete(storage, key)),
    ]
    checks: list[StorageCheck] = []
    try:
        for name, step in steps:
            try:
                step()
            except _RefusedError as refused:
                return [*checks, StorageCheck(name, f"{storage.uri}: {refused}")]
            except StorageError as error:
                return [*checks, StorageCheck(name, f"cannot {name}: {error}")]
            checks.append(StorageCheck(name))
        return checks
    finally:
        with suppress(StorageError):
            storage.delete(key)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _list(storage: Storage, folder: str) -> None:
    storage.list(f"{folder}/")


def _write(storage: Storage, key: str) -> None:
    try:
        storage.write_bytes(key, _CONTENT)
    except StorageError as error:
        if "access denied" in str(error) or "permission denied" in str(error) or "read-only" in str(error):
            raise _RefusedError(f"it can be listed but not written, at least by these credentials: {error}") from None
        raise


def _read(storage: Storage, key: str) -> None:
    if storage.read_bytes(key) != _CONTENT:
        raise _RefusedError("it gives back other bytes than were written")
    if storage.read_bytes(key, start=10, end=20) != _CONTENT[10:20]:
        raise _RefusedError("it gives back another range of bytes than was asked for")
    if [entry.key for entry in storage.list(key)] != [key]:
        raise _RefusedError("an object that was just written is not listed")


def _create_once(storage: Storage, key: str) -> None:
    with suppress(AlreadyExistsError):
        storage.write_bytes(key, _OTHER, if_absent=True)
        raise _RefusedError(_UNCONDITIONAL.format(what="an object that exists already"))


def _replace_known(storage: Storage, key: str) -> None:
    first = storage.write_bytes(key, _CONTENT)
    second = storage.write_bytes(key, _OTHER, if_version=first)
    entry = storage.stat(key)
    if entry is None or entry.version != second:
        raise _RefusedError("its versions change without a write")
    with suppress(ConflictError):
        storage.write_bytes(key, _CONTENT, if_version=first)
        raise _RefusedError(_UNCONDITIONAL.format(what="an object in the place of another version"))


def _delete(storage: Storage, key: str) -> None:
    storage.delete(key)
    if storage.exists(key):
        raise _RefusedError("a deleted object is still there")


def _first_missing(path: Path | None) -> Path | None:
    """The uppermost folder on the way that the check will have made."""
    while path is not None and not path.parent.exists():
        path = path.parent
    return path
