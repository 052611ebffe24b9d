"""Checkpoints in a run's storage of which each worker stores a shard: its part of the weights and
the training state.

    every worker   model-shard-00002-of-00004  train_state-shard-00002-of-00004  its report, report-shard-00002-of-00004
    rank 0, once all reports are there         config, tokenizer, raymill.json   the manifest

A report has the size and the SHA-256 of the files before it, which the manifest then lists, or why
there are none.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from cluster.storage.uris import StorageError
from jobs.run.checkpoints import RunCheckpoints
from model.files import checkpoint_folder as layout
from model.files.checkpoint import manifest_of
from model.files.durable_files import sync
from model.files.failpoints import failpoint
from model.files.state_hash import COUNT, WORDS, StoredState, read_state, words_of
from model.files.tensor_contents import TensorContents

Reports = list[dict[str, Any]]

_REPORT = "report.json"


class ShardedCheckpoint:
    """One checkpoint, in `count` shards."""

    def __init__(self, checkpoints: RunCheckpoints, name: str, count: int) -> None:
        self.name, self._checkpoints, self._count = name, checkpoints, count
        self._folder = checkpoints.folder(name)

    def file(self, whole: str, index: int) -> str:
        """Returns the name of a worker's shard of a file."""
        return layout.shard_of(whole, index, count=self._count)

    def store(self, index: int, spooled: Path, report: Mapping[str, Any]) -> None:
        """Moves a worker's files from a folder of its own into the checkpoint, and adds their
        report. After an error another call continues."""
        local = self._folder.local_path("")
        for file in sorted(spooled.glob("*.safetensors")):
            if local is None:
                self._folder.upload_file(file, file.name)
                file.unlink()
            else:
                local.mkdir(parents=True, exist_ok=True)
                file.replace(local / file.name)
                sync(local)
            failpoint("mid_shard")
        self._folder.write_bytes(self.file(_REPORT, index), json.dumps(report).encode())
        failpoint("after_shard")

    def reports(self) -> Reports | None:
        """Returns the workers' reports; None while one is missing."""
        wanted = [self.file(_REPORT, index) for index in range(self._count)]
        if not {*wanted} <= self._sizes().keys():
            return None
        sizes = self._sizes()  # that listing's first pages may be older than the last report
        reports = [json.loads(self._folder.read_bytes(file)) for file in wanted]
        wrong = []
        for report in reports:
            if "refused" not in report:
                wrong += [file for file in report if sizes.get(file) != report[file]["size"]]
        return [{"refused": f"{', '.join(wrong)} did not arrive whole"}] if wrong else reports

    def _sizes(self) -> dict[str, int]:
        return {entry.key: entry.size for entry in self._folder.list()}

    def read_state(self, shapes: Mapping[str, Sequence[int]]) -> StoredState:
        """Reads the whole state back, a part at a time."""
        kinds = (layout.WEIGHTS, layout.TRAIN_STATE)
        files = [self.file(kind, index) for kind in kinds for index in range(self._count)]
        return read_state(self._stored(files), shapes)

    def altered(self, reports: Reports) -> list[str]:
        """Returns the files that, read back, have other words than the state had that was
        copied."""
        files: list[str] = []
        for report in reports:
            for file, entry in report.items():
                stored = self._stored([file])
                names = [name for name in stored.names if name != COUNT]
                pieces = chain.from_iterable(map(stored.stretches, names))
                if sum(map(words_of, pieces)) % WORDS != entry["words"]:
                    files.append(file)
        return files

    def _stored(self, files: Sequence[str]) -> TensorContents:
        return TensorContents(files, self._folder.read_bytes, source=self._folder.uri)

    def complete(self, descriptions: Mapping[str, bytes], reports: Reports) -> bytes:
        """Publishes the checkpoint, whose shards are stored, and returns its manifest. After an
        error another call continues. Raises `LeaseLostError`."""
        files: dict[str, Any] = {}
        for report in reports:
            for file, entry in report.items():
                files[file] = {name: entry[name] for name in ("size", "sha256")}
        for file, content in descriptions.items():
            self._checkpoints.check_fence()
            self._folder.write_bytes(file, content)
            files[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = manifest_of(files, version=layout.SHARDED_VERSION)
        self._checkpoints.publish_manifest(self.name, manifest)
        with suppress(StorageError):  # nobody reads them any more
            for index in range(self._count):
                self._folder.delete(self.file(_REPORT, index))
        return manifest


def stored_state(checkpoints: RunCheckpoints, name: str) -> TensorContents:
    """Returns the weights and the training state of a checkpoint, in shards or whole, where they
    are: nothing but what is asked for is read. Raises `CheckpointError`."""
    folder = checkpoints.folder(name)
    files = json.loads(folder.read_bytes(layout.MANIFEST))["files"]
    wanted = layout.state_files(files, place=folder.uri)
    return TensorContents(wanted, folder.read_bytes, source=folder.uri)
