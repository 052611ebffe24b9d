"""The ledger of a run: a line of JSON per optimizer step and per event, appended and never rewritten.

Steps that were lost to a failure are taken again and stand in the ledger again; of the lines of one step the last
one counts. A reader therefore needs no index, and a crash costs at most an unfinished last line.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.storage import NotFoundError, Storage

LEDGER = "ledger.jsonl"

_MIRROR_INTERVAL_S = 10.0

Line = dict[str, Any]


class LedgerWriter:
    """Appends lines; to object storage, where nothing can be appended, it copies the whole file now and then."""

    def __init__(self, run: Storage) -> None:
        self._run = run
        path = run.local_path(LEDGER)
        self._is_mirrored = path is None
        if path is None:
            self._scratch = TemporaryDirectory(prefix="raymill-ledger-")
            path = Path(self._scratch.name) / LEDGER
            path.write_bytes(_stored(run))
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        self._file = self._path.open("ab")
        self._file.truncate(data.rfind(b"\n") + 1)  # a crash's unfinished line
        self._mirrored_at = time.monotonic()

    def event(self, name: str, **fields: Any) -> None:
        self._append({"event": name, "time": round(time.time(), 3), **fields})
        self.mirror()

    def step(self, **fields: Any) -> None:
        self._append({"time": round(time.time(), 3), **fields})
        if time.monotonic() - self._mirrored_at > _MIRROR_INTERVAL_S:
            self.mirror()

    def mirror(self) -> None:
        if self._is_mirrored:
            self._run.write_bytes(LEDGER, self._path.read_bytes())
            self._mirrored_at = time.monotonic()

    def _append(self, line: Line) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@dataclass(frozen=True)
class Recovery:
    """One restart of the worker group: why it is there can be read from the events around it."""

    attempt: int
    lost_steps: int  # completed steps that had to be taken again
    seconds: float  # from the last completed step of the old group to the first of the new one


@dataclass(frozen=True)
class Ledger:
    """A run's lines as read back."""

    lines: list[Line]

    @classmethod
    def read(cls, run: Storage) -> "Ledger":
        """An empty one when the run has none. An unfinished last line is left out."""
        complete = _stored(run).rpartition(b"\n")[0]
        return cls([json.loads(line) for line in complete.splitlines()])

    @property
    def steps(self) -> list[Line]:
        """The line that counts of each step, in order."""
        by_step = {line["step"]: line for line in self.lines if "event" not in line}
        return [by_step[step] for step in sorted(by_step)]

    def events(self, *names: str) -> list[Line]:
        return [line for line in self.lines if "event" in line and (not names or line["event"] in names)]

    @property
    def world_sizes(self) -> list[int]:
        """Of each attempt, in order."""
        return [line["world_size"] for line in self.events("start")]

    def recoveries(self) -> list[Recovery]:
        return list(self._recoveries())

    def _recoveries(self) -> Iterator[Recovery]:
        last_step: Line | None = None
        start: Line | None = None
        for line in self.lines:
            if line.get("event") == "start":
                start = line
            elif "event" not in line:
                if start is not None and last_step is not None:
                    lost = last_step["step"] - start["step"]
                    yield Recovery(start["attempt"], lost, round(line["time"] - last_step["time"], 3))
                start, last_step = None, line

    def fruitless_attempts(self) -> int:
        """Attempts since the run last got further than ever before: a run that only restarts is stuck."""
        furthest, count = 0, 0
        for line in self.lines:
            if line.get("event") == "start":
                count += 1
            elif line.get("event") == "gave_up":
                count = 0  # whoever resumes the run has mended something
            elif "event" not in line and line["step"] > furthest:
                furthest, count = line["step"], 0
        return count


def _stored(run: Storage) -> bytes:
    try:
        return run.read_bytes(LEDGER)
    except NotFoundError:
        return b""
