"""`raymill storage check`: finds out, by an object of its own, whether a storage does all that runs need."""

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.storage.interface import HF, AlreadyExistsError, ConflictError, Storage, StorageError
from cluster.storage.uris import open_storage

_CONTENT, _OTHER = bytes(range(256)), b"other"
_UNCONDITIONAL = (
    "the store takes {what} without looking at its condition, so two writers could both believe to be the only one; "
    "use one with conditional writes: AWS S3, MinIO, Ceph, or a folder"
)


class _RefusedError(Exception):
    """A step found a problem, in words."""


def check_storage(uri: str) -> tuple[list[str], str]:
    """Returns the names of the steps that passed, and the first problem, which is empty if there is none. Raises
    `StorageError` for a wrong URI."""
    if uri.startswith(HF):
        return [], f"{uri}: the Hugging Face Hub can only be read; name a folder or s3://"
    storage, folder = open_storage(uri), f"raymill-check-{secrets.token_hex(8)}"
    key, made = f"{folder}/probe", _first_missing(storage.local_path(folder))
    steps: dict[str, Callable[[Storage, str], object]] = {
        "list": lambda storage, key: storage.list(f"{folder}/"),
        "write": _write,
        "read": _read,
        "create only once": _create_once,
        "replace only a known version": _replace_known,
        "delete": _delete,
    }
    passed: list[str] = []
    try:
        for name, step in steps.items():
            try:
                step(storage, key)
            except _RefusedError as refused:
                return passed, f"{storage.uri}: {refused}"
            except StorageError as error:
                return passed, f"cannot {name}: {error}"
            passed.append(name)
        return passed, ""
    finally:
        with suppress(StorageError):
            storage.delete(key)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _write(storage: Storage, key: str) -> None:
    try:
        storage.write_bytes(key, _CONTENT)
    except StorageError as error:
        if any(reason in str(error) for reason in ("access denied", "permission denied", "read-only")):
            raise _RefusedError(f"it can be listed but not written, at least by these credentials: {error}") from None
        raise


def _read(storage: Storage, key: str) -> None:
    if storage.read_bytes(key) != _CONTENT:
        raise _RefusedError("it returns other bytes than were written")
    if storage.read_bytes(key, start=10, end=20) != _CONTENT[10:20]:
        raise _RefusedError("it returns another range of bytes than was asked for")
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
        raise _RefusedError(_UNCONDITIONAL.format(what="an object that replaces another version"))


def _delete(storage: Storage, key: str) -> None:
    storage.delete(key)
    if storage.exists(key):
        raise _RefusedError("a deleted object is still there")


def _first_missing(path: Path | None) -> Path | None:
    """Returns the uppermost folder on the path that the check will create."""
    while path is not None and not path.parent.exists():
        path = path.parent
    return path
