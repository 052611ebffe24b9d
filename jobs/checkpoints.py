"""A run's checkpoints in its storage: written, found again newest valid first, and thinned out."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.storage import Storage
from model.checkpoint import MANIFEST, verify_checkpoint

_log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}"


def superseded(names: list[str], *, num_to_keep: int, pinned: set[str]) -> list[str]:
    """The checkpoints that may go: all but the newest `num_to_keep` and the pinned ones."""
    return [name for name in sorted(names)[:-num_to_keep] if name not in pinned]


class RunCheckpoints:
    """The folders `checkpoints/step-…` under a run. One writer at a time."""

    def __init__(self, run: Storage) -> None:
        self._storage = run.child("checkpoints")
        self._local = self._storage.local_path("")

    @property
    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        suffix = f"/{MANIFEST}"
        keys = [entry.key for entry in self._storage.list() if entry.key.endswith(suffix)]
        return sorted(key.removesuffix(suffix) for key in keys if not key.startswith("."))

    def uri(self, name: str) -> str:
        return self._storage.child(name).uri

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Makes the checkpoint that `write` puts into a folder appear under `name`, all at once."""
        if self._local is not None:
            write(self._local / name)
            return
        with tempfile.TemporaryDirectory(prefix="raymill-checkpoint-") as scratch:
            write(Path(scratch) / name)
            self._storage.upload_folder(Path(scratch) / name, name, last=MANIFEST)

    def load_newest(self, scratch: Path) -> Path | None:
        """A local folder with the newest checkpoint that is complete and unaltered; None when there is none.

        Those that are not are named in the log and passed over.
        """
        for name in reversed(self.names):
            folder = self.fetch(name, scratch)
            problems = verify_checkpoint(folder)
            if not problems:
                return folder
            _log.warning("checkpoint %s is skipped: %s", self.uri(name), "; ".join(problems))
        return None

    def fetch(self, name: str, scratch: Path) -> Path:
        """A local folder with the checkpoint, below `scratch` where the storage is remote."""
        if self._local is not None:
            return self._local / name
        self._storage.download_folder(name, scratch / name, last=MANIFEST)
        return scratch / name

    def thin_out(self, *, num_to_keep: int, pinned: set[str]) -> None:
        """Deletes superseded checkpoints, the manifest of each first: what is left of one is no checkpoint."""
        for name in superseded(self.names, num_to_keep=num_to_keep, pinned=pinned):
            self._storage.delete(f"{name}/{MANIFEST}")
            for entry in self._storage.list(f"{name}/"):
                self._storage.delete(entry.key)
            if self._local is not None:
                shutil.rmtree(self._local / name)
