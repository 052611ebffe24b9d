"""`raymill storage check`: finds out, by an object of its own, whether a storage does all that runs
need."""

import secrets
import shutil
from collections.abc import Iterator
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
    """Returns the names of the steps that passed, and the first problem, which is empty if there is
    none. Raises `StorageError` for a wrong URI."""
    if uri.startswith(HF):
        return [], f"{uri}: the Hugging Face Hub can only be read; name a folder or s3://"
    storage, folder = open_storage(uri), f"raymill-check-{secrets.token_hex(8)}"
    key, made = f"{folder}/probe", first_missing(storage.local_path(folder))
    steps: list[str] = []
    try:
        for name in _steps(storage, key):
            steps.append(name)
        return steps, ""
    except _RefusedError as refused:
        return steps[:-1], f"{storage.uri}: {refused}"
    except StorageError as error:
        return steps[:-1], f"cannot {steps[-1]}: {error}"
    finally:
        with suppress(StorageError):
            storage.delete(key)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _steps(storage: Storage, key: str) -> Iterator[str]:
    """Yields the name of each step and then takes it. Raises `_RefusedError` for what it finds."""
    yield "list"
    storage.list(key)
    yield "write"
    try:
        storage.write_bytes(key, _CONTENT)
    except StorageError as error:
        if any(
            reason in str(error) for reason in ("access denied", "permission denied", "read-only")
        ):
            raise _RefusedError(
                f"it can be listed but not written, at least by these credentials: {error}"
            ) from None
        raise
    yield "read"
    if storage.read_bytes(key) != _CONTENT:
        raise _RefusedError("it returns other bytes than were written")
    if storage.read_bytes(key, start=10, end=20) != _CONTENT[10:20]:
        raise _RefusedError("it returns another range of bytes than was asked for")
    if [entry.key for entry in storage.list(key)] != [key]:
        raise _RefusedError("an object that was just written is not listed")
    yield "create only once"
    with suppress(AlreadyExistsError):
        storage.write_bytes(key, _OTHER, if_absent=True)
        raise _RefusedError(_UNCONDITIONAL.format(what="an object that exists already"))
    yield "replace only a known version"
    first = storage.write_bytes(key, _CONTENT)
    second = storage.write_bytes(key, _OTHER, if_version=first)
    entry = storage.stat(key)
    if entry is None or entry.version != second:
        raise _RefusedError("its versions change without a write")
    with suppress(ConflictError):
        storage.write_bytes(key, _CONTENT, if_version=first)
        raise _RefusedError(_UNCONDITIONAL.format(what="an object that replaces another version"))
    yield "delete"
    storage.delete(key)
    if storage.exists(key):
        raise _RefusedError("a deleted object is still there")


def first_missing(path: Path | None) -> Path | None:
    """Returns the uppermost folder on the path that the check will create."""
    while path is not None and not path.parent.exists():
        path = path.parent
    return path
