"""What a process that was killed within an upload leaves in a folder."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

from cluster.storage.uris import open_storage
from tests.time_limits import limit_s

WRITTEN = b"half of what was"


def killed_upload(root: Path, key: str) -> Path:
    """Ends a real process with SIGKILL while it uploads to the key, and returns the file that it
    leaves."""
    uploading = multiprocessing.get_context("fork").Process(target=_upload, args=(str(root), key))
    uploading.start()
    uploading.join(limit_s(30))
    assert uploading.exitcode == -signal.SIGKILL
    files = [path for path in (root / key).parent.iterdir() if path.is_file()]
    [left] = [path for path in files if path.read_bytes() == WRITTEN]
    return left


def _upload(uri: str, key: str) -> None:
    shutil.copyfile = _die_halfway
    open_storage(uri).upload_file(Path("whole"), key)


def _die_halfway(source: Path, target: Path) -> None:
    target.write_bytes(WRITTEN)
    os.kill(os.getpid(), signal.SIGKILL)
