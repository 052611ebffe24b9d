"""The log of a run's jobs, kept in the run's storage as it grows, so that it outlives the cluster.

Each launch of a stage has a folder `jobs/<launch>/` with its output in segments, named by their first byte's position.
S3 cannot append to an object, so the newest segment is rewritten while it grows, until it is full. A launch keeps its
first segment and the newest ones; the reader names what is left out between.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from cluster.storage.uris import NotFoundError, Storage, StorageError

JOBS = "jobs"
"""Folder of the run's storage."""

STARTED = "started.json"
"""File in a launch's folder from the beginning."""

_ENDED, _SEGMENT = "ended.json", "log-"
_SEGMENT_BYTES = 256 << 10
_WAITING_SEGMENTS = 32  # 8 MiB of memory for an outage of the storage
_LAUNCH_BYTES = 64 << 20
_NUM_LAUNCHES = 10
_INTERVAL_S = 1.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """The beginning of a launch, for people; `job` is its name in the cluster, empty if started by hand."""

    job: str
    stage: str
    host: str
    time: float  # Unix time, s


@dataclass(frozen=True)
class Ended:
    """The end of a launch; `stopped` if it was asked to; `result` is the stage's, if it had one."""

    exit_code: int
    stopped: bool
    result: dict[str, Any] | None
    time: float  # Unix time, s


class JobLog:
    """The writer of one launch's log. Storage never blocks it: an outage that exceeds its memory costs lines."""

    def __init__(self, run: Storage, launch: str, started: Started, *, launch_bytes: int = _LAUNCH_BYTES) -> None:
        """Raises `StorageError` if the run's storage refuses the first file."""
        for old in launches(run)[: 1 - _NUM_LAUNCHES]:
            folder = run.child(f"{JOBS}/{old}")
            with suppress(StorageError):  # such as one in which jobs may not delete
                # The first file last: a folder without it is no launch.
                for entry in sorted(folder.list(), key=lambda entry: entry.key == STARTED):
                    folder.delete(entry.key)
        self._folder, self._launch_bytes = run.child(f"{JOBS}/{launch}"), launch_bytes
        self._folder.write_bytes(STARTED, json.dumps(asdict(started)).encode())
        self._start, self._growing = 0, bytearray()
        self._full: deque[tuple[int, bytes]] = deque(maxlen=_WAITING_SEGMENTS)
        self._kept: dict[int, int] = {}  # size of each full segment in the storage, by its start
        self._num_stored = 0  # bytes of the growing segment that the storage has
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_stored, name="job-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        with self._lock:
            self._growing += line
            if len(self._growing) >= _SEGMENT_BYTES:
                self._full.append((self._start, bytes(self._growing)))
                self._start += len(self._growing)
                self._growing, self._num_stored = bytearray(), 0

    def close(self, ended: Ended, *, timeout_s: float = 30.0) -> None:
        """Returns once everything is stored, or after `timeout_s` of failed attempts."""
        self._closing.set()
        self._thread.join()
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._store()
                self._folder.write_bytes(_ENDED, json.dumps(asdict(ended)).encode())
                return
            except StorageError as error:
                if time.monotonic() > deadline_s:
                    _LOG.warning("the end of the log is lost: %s", error)
                    return
            time.sleep(_INTERVAL_S)

    def _keep_stored(self) -> None:
        while not self._closing.wait(_INTERVAL_S):
            try:
                self._store()
            except StorageError as error:  # an outage, which the stage itself reports
                _LOG.debug("the log is not stored yet: %s", error)

    def _store(self) -> None:
        while True:
            with self._lock:
                full = self._full[0] if self._full else None
                start, growing = self._start, bytes(self._growing)
            if full is None:
                break
            self._folder.write_bytes(_segment(full[0]), full[1])
            self._kept[full[0]] = len(full[1])
            with self._lock:
                if self._full and self._full[0] is full:
                    self._full.popleft()
            while sum(self._kept.values()) > self._launch_bytes and len(self._kept) > 2:
                oldest = sorted(self._kept)[1]
                del self._kept[oldest]
                with suppress(StorageError):
                    self._folder.delete(_segment(oldest))
        if len(growing) > self._num_stored:
            self._folder.write_bytes(_segment(start), growing)
            with self._lock:
                self._num_stored = len(growing) if start == self._start else 0


class LogReader:
    """The reader of one launch's log, even as it grows."""

    def __init__(self, run: Storage, launch: str) -> None:
        self._folder = run.child(f"{JOBS}/{launch}")
        self._position = 0

    def started(self) -> Started:
        return Started(**json.loads(self._folder.read_bytes(STARTED)))

    def ended(self) -> Ended | None:
        try:
            return Ended(**json.loads(self._folder.read_bytes(_ENDED)))
        except NotFoundError:
            return None

    def new_text(self) -> Iterator[str]:
        """Yields what is new since the last call, in pieces of whole lines."""
        for entry in self._folder.list(_SEGMENT):
            start = int(entry.key.removeprefix(_SEGMENT))
            if start + entry.size <= self._position:
                continue
            if start > self._position:
                yield f"[{start - self._position:,} bytes are left out here]\n"
                self._position = start
            try:
                content = self._folder.read_bytes(entry.key, start=self._position - start)
            except NotFoundError:  # thinned out meanwhile
                continue
            whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
            self._position += len(whole)
            yield whole.decode(errors="replace")


def launches(run: Storage) -> list[str]:
    """Returns the names of the run's launches, oldest first."""
    keys = [entry.key for entry in run.child(JOBS).list()]
    return sorted(key.partition("/")[0] for key in keys if key.endswith(f"/{STARTED}"))


def _segment(start: int) -> str:
    return f"{_SEGMENT}{start:012d}"
