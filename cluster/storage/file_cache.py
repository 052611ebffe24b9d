"""A bounded cache of remote files on this node's disk, each under its SHA-256, which the node's
processes share.

One process fetches at a time (`flock`), and the others then find the copy. Before fetching it makes
room: the least recently used copies go. A copy appears by a rename once its bytes are proven, never
half.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from cluster.storage.interface import Entry, Storage, StorageError, join_uri
from model.files.durable_files import sync

_PIECE_BYTES = 8 << 20  # of a request
_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class FileCache:
    """Copies of the files of a storage that this process wants to have near. An entry's version is
    its SHA-256."""

    def __init__(self, storage: Storage, folder: Path, *, max_bytes: int) -> None:
        """Touches neither disk nor network before the first wish. The folder takes up to
        `max_bytes`, and never more than half of what is free on its disk."""
        self._storage, self.folder, self._max_bytes = storage, folder, max_bytes
        self._wanted: Sequence[Entry] = []
        self.altered: list[str] = []  # says which files have other bytes than they should

    def want(self, files: Sequence[Entry]) -> None:
        """Fetches these files in the background, in order, as many as have room together; never
        waits. Copies of other files may be removed for them."""
        self._wanted = files
        threading.Thread(
            target=self._fetch_all, args=(files,), name="file-cache", daemon=True
        ).start()

    def _fetch_all(self, files: Sequence[Entry]) -> None:
        kept: dict[str, None] = {}
        try:
            for file in files:
                while self._wanted is files and not self._is_settled(file, kept):
                    time.sleep(_RETRY_S)
                kept[file.version] = None
        except OSError as error:
            _log.info(
                "%d of the next %d files are in %s, no more: %s",
                len(kept),
                len(files),
                self.folder,
                error,
            )

    def _is_settled(self, file: Entry, kept: Collection[str]) -> bool:
        """Fetches a file that is not here; returns False while the storage is down. Raises
        `OSError` without room."""
        target, partial, digest = (
            self.folder / file.version,
            self.folder / "partial",
            hashlib.sha256(),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.folder.with_name(f"{self.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                os.utime(target)
                return True
            self._make_room(file.size, kept)
            try:
                with partial.open("wb") as copy:
                    for start in range(0, file.size, _PIECE_BYTES):
                        end = min(file.size, start + _PIECE_BYTES)
                        piece = self._storage.read_bytes(file.key, start=start, end=end)
                        digest.update(piece)
                        copy.write(piece)
            except StorageError:  # whoever waits for a row reports the outage
                return False
            if (found := digest.hexdigest()) == file.version:
                sync(partial)
                partial.rename(target)
            else:
                uri = join_uri(self._storage.uri, file.key)
                self.altered.append(
                    f"{uri} has SHA-256 {found[:12]}…, the manifest says {file.version[:12]}…"
                )
            return True

    def _make_room(self, num_bytes: int, kept: Collection[str]) -> None:
        wanted = {file.version for file in self._wanted}
        copies = [*self.folder.iterdir()]
        copies.sort(key=lambda copy: (copy.name in wanted, copy.stat().st_mtime_ns))
        held = sum(copy.stat().st_size for copy in copies)
        bound = min(self._max_bytes, (held + shutil.disk_usage(self.folder).free) // 2)
        for copy in copies:
            if held + num_bytes > bound and copy.name not in kept:
                held -= copy.stat().st_size
                copy.unlink()
        if held + num_bytes > bound:
            raise OSError(errno.ENOSPC, f"{held:,} of {bound:,} bytes are in use")
