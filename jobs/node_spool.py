"""Where a node keeps what a run has yet to bring into remote storage; the next attempt on this node finds it there."""

import hashlib
import os
import tempfile
from pathlib import Path

from cluster.storage import Storage, StorageError


def node_spool(run: Storage) -> Path:
    """A folder of this node and user alone, the same for each process that works at the run. Made if missing."""
    folder = Path(tempfile.gettempdir()) / f"raymill-spool-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user; remove it, or set TMPDIR")
    folder /= hashlib.sha256(run.uri.encode()).hexdigest()[:24]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
