"""The log of a run's jobs, kept in the run's storage as it grows, so that it outlives the cluster.

Each launch of a stage has a folder `jobs/<launch>/` with its output in segments, named by their
first byte's position. S3 cannot append to an object, so the newest segment is rewritten while it
grows, until it is full. A launch keeps its first segment and the newest ones; the reader names what
is left out between.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cluster.storage.uris import NotFoundError, Storage, StorageError, join_uri

JOBS = "jobs"
"""Folder of the run's storage."""

STARTED = "started.json"
"""File in a launch's folder from the beginning."""

_ENDED, _SEGMENT = "ended.json", "log-"
_SEGMENT_BYTES = 256 << 10
_HELD_SEGMENTS = 33  # the growing one, and 8 MiB of memory for an outage of the storage
_LAUNCH_BYTES = 64 << 20
_NUM_LAUNCHES = 10
_INTERVAL_S = 1.0
_LOG = logging.getLogger(__name__)

Stored = TypeVar("Stored")


@dataclass(frozen=True)
class Started:
    """The beginning of a launch, for people; `job` is its name in the cluster, empty if started by
    hand; `command` continues it, where a command at a terminal began it."""

    job: str
    stage: str
    host: str
    time: float  # Unix time, s
    command: str = ""


@dataclass(frozen=True)
class Ended:
    """The end of a launch; `stopped` if it was asked to; `result` is the stage's, if it had one."""

    exit_code: int
    stopped: bool
    result: dict[str, Any] | None
    time: float  # Unix time, s


class JobLog:
    """The writer of one launch's log. Storage never blocks it: an outage that exceeds its memory
    costs lines."""

    def __init__(
        self, run: Storage, launch: str, started: Started, *, launch_bytes: int = _LAUNCH_BYTES
    ) -> None:
        """Raises `StorageError` if the run's storage refuses the first file."""
        self.started = started
        for old in launches(run)[: 1 - _NUM_LAUNCHES]:
            folder = run.child(f"{JOBS}/{old}")
            with suppress(StorageError):  # such as one in which jobs may not delete
                # The first file last: a folder without it is no launch.
                for entry in sorted(folder.list(), key=lambda entry: entry.key == STARTED):
                    folder.delete(entry.key)
        self._folder, self._launch_bytes = run.child(f"{JOBS}/{launch}"), launch_bytes
        self._folder.write_bytes(STARTED, json.dumps(asdict(started)).encode())
        # By their starts; the last one grows
        self._held = deque([(0, bytearray())], maxlen=_HELD_SEGMENTS)
        self._stored: dict[int, int] = {}  # size of each segment in the storage, by its start
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_stored, name="job-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        with self._lock:
            start, growing = self._held[-1]
            growing += line
            if len(growing) >= _SEGMENT_BYTES:
                self._held.append((start + len(growing), bytearray()))

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
        is_full = True
        while is_full:
            with self._lock:
                start, segment = self._held[0]
                is_full, content = len(self._held) > 1, bytes(segment)
            if len(content) > self._stored.get(start, 0):
                self._folder.write_bytes(_segment(start), content)
                self._stored[start] = len(content)
            with self._lock:
                if is_full and self._held[0][0] == start:
                    self._held.popleft()
            while sum(self._stored.values()) > self._launch_bytes and len(self._stored) > 2:
                oldest = sorted(self._stored)[1]
                del self._stored[oldest]
                with suppress(StorageError):
                    self._folder.delete(_segment(oldest))


class LogReader:
    """The reader of one launch's log, even as it grows."""

    def __init__(self, run: Storage, launch: str) -> None:
        self._folder = run.child(f"{JOBS}/{launch}")
        self._position = 0

    def started(self) -> Started:
        return parsed(
            Started, self._folder.read_bytes(STARTED), join_uri(self._folder.uri, STARTED)
        )

    def ended(self) -> Ended | None:
        content = self._folder.find_bytes(_ENDED)
        return (
            None if content is None else parsed(Ended, content, join_uri(self._folder.uri, _ENDED))
        )

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


def parsed(kind: Callable[..., Stored], content: bytes, uri: str) -> Stored:
    """Returns the JSON object as a `kind`. Raises `StorageError` for a damaged file, or one of
    another version."""
    try:
        return kind(**json.loads(content))
    except (ValueError, TypeError) as error:
        remedy = (
            "if it is whole, a newer raymill wrote it: use that one; if it is damaged, move it away"
        )
        raise StorageError(f"{uri} cannot be read ({error}): {remedy}") from None


def launches(run: Storage) -> list[str]:
    """Returns the names of the run's launches, oldest first."""
    keys = [entry.key for entry in run.child(JOBS).list()]
    return sorted(key.partition("/")[0] for key in keys if key.endswith(f"/{STARTED}"))


def _segment(start: int) -> str:
    return f"{_SEGMENT}{start:012d}"
