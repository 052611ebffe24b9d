"""Writes and reads a run's ledger: a line of JSON per optimizer step and per event, appended and
never rewritten.

Steps that were lost to a failure are taken again and written again; the last line of a step counts.
So a reader needs no index, and a crash costs at most an unfinished last line. Each line has the hash
of the one before (`ledger_chain`), which is for who proves the file, and not a field of the line.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import AlreadyExistsError, ConflictError, Storage, StorageError
from jobs.run.end import End, end_of, is_pause
from jobs.run.ledger_chain import KEY as CHAIN
from jobs.run.ledger_chain import encoded, hash_of, head_of
from jobs.run.storage_retry import LEDGER_LINES, Outage, node_spool, patiently
from jobs.run.writer_generation import Fence
from raymill.errors import UserError

LEDGER = "ledger.jsonl"

_MIRROR_INTERVAL_S = 1.0
_MIRROR_BYTES_PER_S = 1e6  # so a ledger of 30 MB is copied each half minute
_BLOCK_BYTES = 1 << 24

Line = dict[str, Any]

_WAYS_BACK = ("corruption", "undecided", "refuted")
_OF_STEPS = (None, "skip", "rollback", "validation")
"""Events of lines that say what came of a step; a step's own line has none."""


class LedgerWriter:
    """Appends lines; slow or broken storage never delays or ends the training that writes them.

    A local file gets each line at once. To object storage, which has no appends, a thread copies
    the whole file now and then from the node's spool, where the next attempt on this node finds the
    lines that were not copied. Each writer has its own file, which it begins with a copy of the one
    before: what a stale one still appends reaches nobody.
    """

    def __init__(self, run: Storage, fence: Fence | None = None) -> None:
        """Raises `StorageError` when the run's ledger cannot be read."""
        self._run, self._fence = run, fence
        path = run.local_path(LEDGER)
        self._is_mirrored = path is None
        self._version: str | None = None
        if path is None:
            self._version = _version(run)
            path = _spooled(run, generation=fence.generation if fence else 0)
        elif path.exists():
            run.upload_file(path, LEDGER)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._size = self._end_of_lines(os.fstat(self._file.fileno()).st_size)
        self._file.truncate(self._size)  # a crash's unfinished line
        self._head = self._head_of_lines()
        self._waiting: list[Line] = []  # that the disk has not accepted yet
        self._num_mirrored = 0
        self._lost: LeaseLostError | None = None
        self._outage = Outage(LEDGER_LINES, self.event)
        self._appending, self._mirroring = threading.RLock(), threading.Lock()
        self._closing = threading.Event()
        self._mirror = threading.Thread(target=self._keep_mirrored, name="ledger", daemon=True)
        if self._is_mirrored:
            self._mirror.start()

    def event(self, name: str, **fields: Any) -> None:
        """Raises `LeaseLostError` when this is no longer the run's writer."""
        self._append({"event": name, "time": round(time.time(), 3), **fields})

    def step(self, **fields: Any) -> None:
        """Raises `LeaseLostError` when this is no longer the run's writer."""
        self._append({"time": round(time.time(), 3), **fields})

    def blocks(self, *, start: int) -> Iterator[bytes]:
        """Yields the lines from a byte on, some megabytes of whole lines at once, with the lines
        that the storage does not have yet. Raises `UserError` where another process has changed
        them."""
        size, length = self._size, _BLOCK_BYTES
        while start < size:
            piece = os.pread(self._file.fileno(), min(length, size - start), start)
            end = piece.rfind(b"\n") + 1
            if not end and length >= size - start:
                raise UserError(
                    f"{self._path} has no end of a line where this process wrote one: another process changed it. "
                    "Start the run again: it goes on from the whole lines"
                )
            length = _BLOCK_BYTES if end else 2 * length
            if end:
                yield piece[:end]
            start += end

    def mirror(self) -> None:
        """Returns once the run's storage has every line. Raises `StorageError`, or `OSError` when a
        disk is full."""
        with self._appending:
            self._write_waiting()
            os.fsync(self._file.fileno())
        if not self._is_mirrored:
            return
        with self._mirroring:
            content = self._content()
            if len(content) == self._num_mirrored:
                return
            try:
                self._replace(content)
            except (AlreadyExistsError, ConflictError):
                if self._fence is not None:
                    self._fence.check()
                self._version = _version(self._run)  # the answer to our own write was lost
                self._replace(content)
            self._num_mirrored = len(content)

    def _replace(self, content: bytes) -> None:
        version = self._version
        self._version = self._run.write_bytes(
            LEDGER, content, if_absent=not version, if_version=version
        )

    def close(self) -> None:
        """Returns once the run's storage has every line, however long that takes. Raises
        `LeaseLostError`."""
        self.abandon()  # the thread; this call copies what is left
        patiently(self.mirror, LEDGER_LINES)
        if self._is_mirrored:
            self._mirror.join()
            self._path.unlink(missing_ok=True)
        self._file.close()

    def abandon(self) -> None:
        """Ends the mirroring; the next writer on this node finds the lines that were not copied."""
        self._closing.set()

    def _end_of_lines(self, size: int) -> int:
        """Returns where the last whole line ends in the file's first `size` bytes."""
        while size:
            start = max(0, size - _BLOCK_BYTES)
            piece = os.pread(self._file.fileno(), size - start, start)
            end = piece.rfind(b"\n") + 1
            if end:
                return start + end
            size = start
        return 0

    def _head_of_lines(self) -> str | None:
        """Returns the hash of the last line."""
        start = max(0, self._size - 1)
        while start:
            start = max(0, start - _BLOCK_BYTES)
            piece = os.pread(self._file.fileno(), self._size - start, start)
            if not start or piece.count(b"\n", 0, -1):
                return head_of(piece)
        return None

    def _content(self) -> bytes:
        # A newer writer may have removed its name
        return os.pread(self._file.fileno(), self._size, 0)

    def _append(self, line: Line) -> None:
        with self._appending:
            if self._lost is not None:
                raise self._lost
            self._waiting.append(line)
            try:
                self._write_waiting()
            except LeaseLostError:
                raise
            except (StorageError, OSError) as error:
                if "storage_down" not in [waiting.get("event") for waiting in self._waiting]:
                    self._outage.failed(error)
            else:
                if not self._is_mirrored:
                    self._outage.over()

    def _write_waiting(self) -> None:
        if not self._is_mirrored and self._fence is not None:
            self._fence.check()
        content, head = b"", self._head
        for line in self._waiting:
            written = encoded(line, head)
            content, head = content + written + b"\n", hash_of(written)
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(content)
        self._head, self._waiting = head, []

    def _keep_mirrored(self) -> None:
        pause_s = _MIRROR_INTERVAL_S
        while not self._closing.wait(pause_s):
            try:
                self.mirror()
            except LeaseLostError as error:
                self._lost = error
                return
            except (StorageError, OSError) as error:
                pause_s = self._outage.failed(error)
            else:
                self._outage.over()
                pause_s = _MIRROR_INTERVAL_S + self._size / _MIRROR_BYTES_PER_S


@dataclass(frozen=True)
class Interruption:
    """The start of a later attempt; the events around it tell its cause."""

    attempt: int
    step: int  # the last step before the start
    world_size: int
    previous_world_size: int
    pause_s: float | None = None  # from the save to the start, where the run had been asked to stop
    lost_steps: int = 0  # completed steps that had to be taken again
    # From the last step before to the first one after; None without one of them
    seconds: float | None = None

    @property
    def is_resize(self) -> bool:
        return self.world_size != self.previous_world_size

    @property
    def label(self) -> str:
        if self.pause_s is not None:
            return "resume"
        if self.is_resize:
            return f"resize {self.previous_world_size} → {self.world_size}"
        return "restart"


@dataclass(frozen=True)
class Void:
    """Steps that must not be continued from and no longer count, since the run went back behind them: a
    worker that had part in it was found wrong."""

    to_step: int
    generation: int  # of the writers, up to this one
    attempt: int  # snapshots are void up to this attempt

    def covers(self, step: int, generation: int) -> bool:
        """Reports whether the checkpoint of a step, by a writer of that generation, is void."""
        return step > self.to_step and generation <= self.generation

    def undoes(self, line: Line) -> bool:
        """Reports whether a line from before is void: a step's line, or a decision or measurement
        made at one."""
        if line.get("event") not in _OF_STEPS:
            return False
        step = line["last"] if line.get("event") == "rollback" else line["step"]
        return bool(step > self.to_step)


def void(lines: Iterable[Line]) -> list[Void]:
    """Returns what the run has gone back behind, in order."""
    ways_back: list[Void] = []
    for line in lines:
        if line.get("event") in _WAYS_BACK and line["to_step"] is not None:
            # After a self-test the attempt of this number has not begun
            attempt = line["attempt"] - (line.get("what") == "self_test")
            ways_back.append(Void(line["to_step"], line["generation"], attempt))
    return ways_back


@dataclass(frozen=True)
class Ledger:
    """A run's lines as read back."""

    lines: list[Line]

    @classmethod
    def read(cls, run: Storage) -> "Ledger":
        """Reads a run's ledger, empty where there is none, without an unfinished last line."""
        return cls.parse(run.find_bytes(LEDGER) or b"", f"{run.uri}/{LEDGER}")

    @classmethod
    def parse(cls, content: bytes, uri: str, *, num_before: int = 0) -> "Ledger":
        """Returns the whole lines of what follows the first `num_before`. Raises `UserError` for a
        damaged one."""
        lines = content.rpartition(b"\n")[0].splitlines()
        numbered = enumerate(lines, start=num_before + 1)
        return cls([parsed_line(line, uri, number) for number, line in numbered])

    @property
    def standing(self) -> "Ledger":
        """The lines without what the run has gone back behind: steps, and what was decided and
        measured at them."""
        if not void(self.lines):
            return self
        kept: list[Line] = []
        for line in self.lines:
            for way in void([line]):
                kept = [earlier for earlier in kept if not way.undoes(earlier)]
            kept.append(line)
        return Ledger(kept)

    @property
    def steps(self) -> list[Line]:
        """The line of each step that counts, in order. Steps that the guard skipped or rolled back
        have none."""
        by_step: dict[int, Line] = {}
        for line in self.standing.lines:
            if "event" not in line:
                by_step[line["step"]] = line
            elif line["event"] == "rollback":
                for step in range(line["first"], line["last"] + 1):
                    by_step.pop(step, None)
        return [by_step[step] for step in sorted(by_step)]

    def events(self, *names: str) -> list[Line]:
        events = [line for line in self.lines if "event" in line]
        return [line for line in events if not names or line["event"] in names]

    @property
    def end(self) -> End | None:
        """How the run has ended; None while it may be at work."""
        return end_of(self.lines)

    @property
    def is_finished(self) -> bool:
        return self.end is End.FINISHED

    @property
    def rollbacks(self) -> tuple[tuple[int, int], ...]:
        """The first and the last step that each rollback that counts left out, in order."""
        decided = self.standing.events("rollback")
        return tuple((line["first"], line["last"]) for line in decided)

    @property
    def world_sizes(self) -> list[int]:
        """The number of workers of each attempt, in order."""
        return [line["world_size"] for line in self.events("start")]

    @property
    def pauses(self) -> dict[int, float]:
        """Seconds between a requested stop, or the end of a budget, and the next start, by the
        attempt that resumed the run.

        Nothing failed, so a pause is neither a recovery nor lost time.
        """
        return {
            stop.attempt: stop.pause_s for stop in self.interruptions() if stop.pause_s is not None
        }

    @property
    def wall_s(self) -> float:
        """The seconds from the first line to the last one, without the pauses."""
        return float(self.lines[-1]["time"] - self.lines[0]["time"] - sum(self.pauses.values()))

    def interruptions(self) -> list[Interruption]:
        stops: list[Interruption] = []
        begun: Line | None = None  # a start after which no step was completed yet
        last_step: Line | None = None  # without a requested stop after it
        saved: Line | None = None  # for such a stop
        world_size = 0  # of the last start
        for line in self.lines:
            if is_pause(line):
                saved, last_step = line, None
            elif line.get("event") == "start":
                if world_size:
                    pause_s = round(line["time"] - saved["time"], 3) if saved else None
                    stop = Interruption(
                        attempt=line["attempt"],
                        step=line["step"],
                        world_size=line["world_size"],
                        previous_world_size=world_size,
                        pause_s=pause_s,
                    )
                    stops.append(stop)
                begun, saved, world_size = line, None, line["world_size"]
            elif "event" not in line:
                if stops and begun and last_step:
                    lost = last_step["step"] - begun["step"]
                    seconds = round(line["time"] - last_step["time"], 3)
                    stops[-1] = replace(stops[-1], lost_steps=lost, seconds=seconds)
                begun, last_step = None, line
        return stops

    def recoveries(self) -> list[Interruption]:
        """Returns the interruptions between two steps of a run that had not been asked to stop."""
        return [stop for stop in self.interruptions() if stop.seconds is not None]


def parsed_line(line: bytes, uri: str, number: int) -> Line:
    """Returns a line of the ledger at the URI. Raises `UserError`, which names its number, where it
    is damaged."""
    try:
        fields: Line = {**json.loads(line)}
        fields.pop(CHAIN, None)
        return fields
    except (ValueError, TypeError):
        raise UserError(
            f"{uri}, line {number} is damaged: expected an object of JSON, not {line[:40]!r}; restore the file, or "
            "remove that line"
        ) from None


class LedgerTail:
    """Reads the lines of a run as they are added, each once."""

    def __init__(self, run: Storage) -> None:
        self._run, self._size = run, 0
        self.ledger = Ledger([])  # all lines so far

    def read(self) -> list[Line]:
        """Returns the new lines. Raises `StorageError`, and `UserError` for a damaged line."""
        entry = self._run.stat(LEDGER)
        if entry is None or entry.size <= self._size:
            return []
        content = self._run.read_bytes(LEDGER, start=self._size).rpartition(b"\n")[0] + b"\n"
        uri = f"{self._run.uri}/{LEDGER}"
        added = Ledger.parse(content, uri, num_before=len(self.ledger.lines))
        if added.lines:
            self._size += len(content)
            self.ledger.lines.extend(added.lines)
        return added.lines


def _version(run: Storage) -> str | None:
    entry = run.stat(LEDGER)
    return entry.version if entry else None


def _spooled(run: Storage, *, generation: int) -> Path:
    """Makes this node's copy of the ledger: the run's lines, and those that a killed writer did not
    copy there."""
    stored = run.find_bytes(LEDGER) or b""
    spool = node_spool(run)
    left = {path: path.read_bytes() for path in spool.glob("ledger-*")}
    longer = [content for content in left.values() if content.startswith(stored)]
    path = spool / f"ledger-{generation:04d}.jsonl"
    path.write_bytes(max(longer, key=len, default=stored))
    for other in left.keys() - {path}:
        other.unlink()
    return path
