"""Files hashed as they are written, so that a manifest vouches for what was meant, not for what a
disk kept."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.files.failpoints import failpoint


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes and syncs the file, and returns its size and SHA-256 as a manifest lists them. Raises
    `OSError`.

    The pieces are large, so a thread that writes leaves the interpreter to the others nearly all
    the time.
    """
    failpoint("before_file")
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            file.flush()
            failpoint("mid_file")
        failpoint("before_fsync")
        os.fsync(file.fileno())
    failpoint("after_file")
    return {"size": size, "sha256": digest.hexdigest()}


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
