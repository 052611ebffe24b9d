"""Writes files and folders such that a crash leaves them whole or absent."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from model.files.failpoints import failpoint
from raymill.files.hashed_file import write_hashed


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes and syncs the file, and returns its size and SHA-256 as a manifest lists them. Raises
    `OSError`."""
    failpoint("before_file")
    written = write_hashed(path, _interrupted(pieces))
    failpoint("after_file")
    return written


def _interrupted(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        yield piece
        failpoint("mid_file")
    failpoint("before_fsync")


def sync(path: Path) -> None:
    """Flushes a file's or a folder's content to disk, which a crash of the machine may lose
    before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(source: Path, folder: Path) -> None:
    """Renames a complete folder. An existing one is replaced by two renames, and is absent between
    them."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    failpoint("before_rename")
    source.rename(folder)
    failpoint("after_rename")
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
