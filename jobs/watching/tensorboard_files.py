"""Writes a run's curves for TensorBoard: one event file under `tensorboard/`, made from the ledger.

Each launch rewrites the file from the ledger's first line, so a resumed run has each step once; of
steps that were taken again TensorBoard shows the last, as each attempt records where it began. Uses
tensorboardX, which comes with Ray.
"""

import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from cluster.storage.uris import Storage, StorageError
from jobs.run.ledger import Line
from jobs.watching.run_metrics import curve_samples

FOLDER = "tensorboard"
_COPY_INTERVAL_S = 30.0  # to storage that is not on this machine; more where the file is large
_COPY_BYTES_PER_S = 1e6


class TensorBoardFiles:
    """The event file of one launch. What a full disk or storage that is down refuses is written
    later."""

    def __init__(self, run: Storage) -> None:
        self._run, self._key = run, f"{FOLDER}/events.out.tfevents.{int(time.time())}.raymill"
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._waiting = bytearray()
        self._size = 0  # bytes in the file
        self._copy_at = 0.0
        self._has_replaced = False  # whether the files of earlier launches are deleted
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, line: Line) -> None:
        if line.get("event") == "start":  # the steps after it are taken again
            session = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=line["time"], step=line["step"] + 1, session_log=session))
        elif samples := curve_samples(line):
            values = [
                Summary.Value(tag=sample.curve, simple_value=sample.value) for sample in samples
            ]
            self._write(
                Event(wall_time=line["time"], step=line["step"], summary=Summary(value=values))
            )

    def flush(self, *, at_once: bool = False) -> None:
        """Writes what waits. Raises `StorageError`, or `OSError` where a disk is full."""
        path = self._path()
        with path.open("r+b" if self._size else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(self._waiting)
        self._size += len(self._waiting)
        self._waiting.clear()
        if self._scratch is not None and (at_once or time.monotonic() >= self._copy_at):
            self._run.upload_file(path, self._key)
            self._copy_at = time.monotonic() + max(_COPY_INTERVAL_S, self._size / _COPY_BYTES_PER_S)
        if not self._has_replaced:
            for entry in self._run.list(f"{FOLDER}/"):
                if entry.key != self._key:
                    self._run.delete(entry.key)
            self._has_replaced = True

    def close(self) -> None:
        with suppress(StorageError, OSError):  # the next launch writes it again, from the ledger
            self.flush(at_once=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    def _path(self) -> Path:
        path = self._run.local_path(self._key)
        if path is None:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(
                prefix="raymill-tensorboard-"
            )
            return Path(self._scratch.name, "events")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, event: Event) -> None:
        """Appends a record: length, its checksum, bytes, their checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._waiting += part + struct.pack("<I", masked_crc32c(part))
