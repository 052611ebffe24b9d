"""Files hashed as they are written, so that what lists them vouches for what was meant, not for what
a disk kept."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes and syncs a file, and returns its size and SHA-256. Raises `OSError`.

    The pieces are large, so a thread that writes leaves the interpreter to the others nearly all
    the time.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}
