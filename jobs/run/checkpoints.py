"""Publishes a run's checkpoints in its storage, finds the newest valid one, marks damaged ones,
deletes old ones."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from cluster.settings.run import CheckpointConfig
from cluster.storage.uris import AlreadyExistsError, Storage, StorageError
from jobs.run.storage_retry import node_spool
from jobs.run.writer_generation import Fence
from model.files.checkpoint_folder import MANIFEST, verify_checkpoint
from model.files.durable_files import move_into_place
from model.files.failpoints import failpoint

QUARANTINED = "QUARANTINED"
"""A file in a damaged checkpoint's folder that says what is wrong. Nothing reads or deletes such a
checkpoint."""

_MARKS = {MANIFEST, QUARANTINED}
_SPOOL = ".spool"
_NAME = re.compile(r"step-\d{9}(-\d{4,})?")
_MIN_VERIFIED = 2

_log = logging.getLogger(__name__)


def checkpoint_name(step: int, generation: int = 0) -> str:
    """Returns a name by which checkpoints sort in the order of their steps, then of their
    writers."""
    return f"step-{step:09d}-{generation:04d}" if generation else f"step-{step:09d}"


def step_of(name: str) -> int:
    return int(name.split("-")[1])


def generation_of(name: str) -> int:
    """Returns the number of its writer, 0 where the name has none."""
    _, _, *generation = name.split("-")
    return int(generation[0]) if generation else 0


def superseded(
    complete: Collection[str],
    incomplete: Collection[str],
    *,
    keep: CheckpointConfig,
    verified: Collection[str],
    pinned: Collection[str] = (),
    val_losses: Mapping[str, float] | None = None,
    proven_to: int | None = None,
) -> list[str]:
    """Returns the checkpoints to delete, oldest first; none before two were verified.

    Kept are the newest `keep.num_to_keep`, the `keep.keep_best` of the lowest validation loss, each
    `keep.keep_every_steps`-th step, that of step 0 with which a warm start begins, the pinned ones,
    the two newest verified ones, and the newest one that is proven: the run goes back there where a
    worker is found wrong. The `incomplete` remains of a crash are deleted once they are older than
    the two verified ones.
    """
    names = sorted(complete)
    trusted = [name for name in names if name in verified][-_MIN_VERIFIED:]
    if len(trusted) < _MIN_VERIFIED:
        return []
    losses = {name: loss for name, loss in (val_losses or {}).items() if name in names}
    best = sorted(losses, key=lambda name: (losses[name], name))[: keep.keep_best]
    begun_from = {name for name in names if step_of(name) == 0}
    proven = [name for name in names if proven_to is not None and step_of(name) <= proven_to]
    kept = {*names[-keep.num_to_keep :], *trusted, *best, *pinned, *begun_from, *proven[-1:]}
    if keep.keep_every_steps:
        kept |= {name for name in names if step_of(name) % keep.keep_every_steps == 0}
    garbage = {name for name in incomplete if name < trusted[0] and name not in pinned}
    return sorted(({*names} | garbage) - kept)


class RunCheckpoints:
    """The folders `checkpoints/step-…` under a run. A reader has no fence."""

    def __init__(self, run: Storage, fence: Fence | None = None) -> None:
        self._run, self._fence = run, fence
        self._storage = run.child("checkpoints")
        self._local = self._storage.local_path("")
        self._arrived: dict[str, str] = {}  # SHA-256 of the files that earlier tries have uploaded

    @property
    def names(self) -> list[str]:
        """The complete checkpoints that are not known to be damaged, oldest first."""
        folders = self._folders()
        return sorted(name for name in folders if folders[name] & _MARKS == {MANIFEST})

    @property
    def torn(self) -> list[str]:
        """The checkpoints that lack their manifest and are not known to be damaged, oldest
        first."""
        folders = self._folders()
        return sorted(name for name in folders if not folders[name] & _MARKS)

    @property
    def quarantined(self) -> list[str]:
        """The checkpoints that are known to be damaged."""
        folders = self._folders()
        return sorted(name for name in folders if QUARANTINED in folders[name])

    @property
    def spool(self) -> Path:
        """The folder where checkpoints are written before they are published: beside their place,
        or on this node."""
        return node_spool(self._run) if self._local is None else self._local / _SPOOL

    def folder(self, name: str) -> Storage:
        return self._storage.child(name)

    def uri(self, name: str) -> str:
        return self.folder(name).uri

    def publish(self, spooled: Path) -> None:
        """Moves a complete checkpoint from the spool to its name, all at once.

        Raises `LeaseLostError` when this is no longer the run's writer. After a `StorageError` or
        `OSError` the checkpoint is still in the spool, and another call continues.
        """
        if self._local is not None:
            self.check_fence()
            move_into_place(spooled, self._local / spooled.name)
        else:
            self._upload(spooled)
            shutil.rmtree(spooled)

    def _upload(self, spooled: Path) -> None:
        folder = self.folder(spooled.name)
        manifest = (spooled / MANIFEST).read_bytes()
        # A run that was rolled back
        if folder.exists(MANIFEST) and folder.read_bytes(MANIFEST) != manifest:
            self.check_fence()
            folder.delete(MANIFEST)
        files = json.loads(manifest)["files"]
        for name, entry in files.items():
            if self._arrived.get(f"{spooled.name}/{name}") != entry["sha256"]:
                self.check_fence()
                folder.upload_file(spooled / name, name)
                self._arrived[f"{spooled.name}/{name}"] = entry["sha256"]
        failpoint("before_upload_complete")
        self.publish_manifest(spooled.name, manifest)
        self._arrived.clear()

    def publish_manifest(self, name: str, manifest: bytes) -> None:
        """Makes a checkpoint whole, of which all other files are stored."""
        folder = self.folder(name)
        files = json.loads(manifest)["files"]
        sizes = {entry.key: entry.size for entry in folder.list()}
        wrong = [file for file, entry in files.items() if sizes.get(file) != entry["size"]]
        if wrong:
            self._arrived.clear()
            raise StorageError(
                f"{folder.uri}: {', '.join(wrong)} did not arrive whole; uploading them again"
            )
        self.check_fence()
        failpoint("before_manifest")
        try:
            folder.write_bytes(MANIFEST, manifest, if_absent=True)
        except AlreadyExistsError:  # the answer to an earlier try was lost
            if folder.read_bytes(MANIFEST) != manifest:
                raise
        failpoint("after_manifest")

    def recover(self) -> None:
        """Publishes the checkpoints of a killed attempt's spool that are newer than everything
        published, and clears the rest."""
        newest = max(self.names, default="")
        for folder in sorted(path.parent for path in self.spool.glob(f"step-*/{MANIFEST}")):
            if folder.name > newest and not verify_checkpoint(folder):
                self.publish(folder)
        self.clear_spool()

    def clear_spool(self) -> None:
        """Removes what earlier attempts left in the spool, and unfinished uploads."""
        self.check_fence()
        replaced = [] if self._local is None else self._local.glob(".step-*")
        for folder in [*self.spool.glob("*step-*"), *replaced]:
            shutil.rmtree(folder)
        self._storage.abort_uploads()

    def find(
        self, scratch: Path, *, left_out: Callable[[int], bool] = lambda step: False
    ) -> tuple[Path | None, dict[str, list[str]]]:
        """Returns the newest complete and unaltered checkpoint in a local folder, and the problems
        of each newer one, by name; `left_out` excludes steps."""
        damaged: dict[str, list[str]] = {}
        for name in reversed(self.names):
            if left_out(step_of(name)):
                continue
            folder = self.fetch(name, scratch)
            problems = verify_checkpoint(folder)
            if not problems:
                return folder, damaged
            _log.warning("checkpoint %s is skipped: %s", self.uri(name), "; ".join(problems))
            damaged[name] = problems
        return None, damaged

    def quarantine(self, name: str, problems: list[str]) -> None:
        """Marks a damaged checkpoint, and keeps all its bytes."""
        self.check_fence()
        self._storage.write_bytes(f"{name}/{QUARANTINED}", "\n".join(problems).encode())

    def fetch(self, name: str, scratch: Path) -> Path:
        """Returns a local folder with the checkpoint, below `scratch` where the storage is
        remote."""
        if self._local is not None:
            return self._local / name
        self._storage.download_folder(name, scratch / name, last=MANIFEST)
        return scratch / name

    def delete(self, names: Iterable[str]) -> None:
        """Deletes checkpoints, each with its manifest first: the rest is then no checkpoint."""
        folders = self._folders()
        for name in names:
            self.check_fence()
            self._storage.delete(f"{name}/{MANIFEST}")
            failpoint("mid_delete")
            for file in folders[name] - {MANIFEST}:
                self._storage.delete(f"{name}/{file}")
            if self._local is not None:
                shutil.rmtree(self._local / name)

    def _folders(self) -> dict[str, set[str]]:
        """Returns the files of each checkpoint, incomplete ones included."""
        folders: dict[str, set[str]] = {}
        for entry in self._storage.list():
            name, _, file = entry.key.partition("/")
            if file and _NAME.fullmatch(name):  # neither the spool nor files that people put there
                folders.setdefault(name, set()).add(file)
        # An interrupted deletion may leave an empty folder
        if self._local is not None and self._local.is_dir():
            for path in self._local.glob("step-*"):
                folders.setdefault(path.name, set())
        return folders

    def check_fence(self) -> None:
        """Raises `LeaseLostError` when this is no longer the run's writer."""
        if self._fence is not None:
            self._fence.check()
