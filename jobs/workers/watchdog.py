"""Runs beside each worker, and when it hangs, keeps its stack and kills it, so that Ray Train
replaces it.

Nothing else would: a worker that was stopped or is deadlocked leaves the others waiting in a
collective for hours. Each watchdog looks only at its own worker: the one that hangs is the one that
gives no sign of life, or that stands still without waiting for others. Where all wait for one
another, they judge together (`hang_watch`), and their watchdogs act.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Self

from cluster.storage.uris import open_storage
from jobs.run.storage_retry import patiently
from jobs.workers.incident_notes import note

HANGS = "hangs"

_POLL_S = 0.5
_STEP_FACTOR = 20  # a straggler that gets a tenth of its time stays below it
# Later than silence is noticed, so that a worker that waits for a silent one is never blamed
_STUCK_FACTOR = 1.25
_UNKNOWN_FACTOR = 10  # the first step may compile, a batch of a validation or a save be long
# By then the worker that it waits for has been killed, or has a reason to wait itself
_FORSAKEN_FACTOR = 20


class Place(StrEnum):
    # Starting and finishing, both of which wait for storage as long as it takes
    AROUND = "around the steps"
    FIRST_STEP = "first step"  # of an attempt, or another one in which kernels are compiled
    STEP = "step"
    VALIDATION = "validation"
    SAVE = "save"


class Waits(StrEnum):
    """The things for which the training thread may wait as long as it takes."""

    WORKERS = "workers"
    STORAGE = "storage"  # whose outages end no training


class Health(StrEnum):
    WELL = "well"
    SILENT = "silent"  # no sign of life: stopped, or stuck outside of its interpreter
    STUCK = "stuck"  # alive, but stands still in its own work
    FORSAKEN = "forsaken"  # waits for other workers forever
    BEHIND = "behind"  # in a message that all others of a round wait for
    BLOCKED = "blocked"  # in a message with others that are as far as itself


_REASONS = {
    Health.SILENT: "it gave no sign of life",
    Health.STUCK: "it stood still in its own work",
    Health.FORSAKEN: "it waited for other workers in vain",
}


@dataclass(frozen=True)
class Hang:
    """A standstill of all workers of a round, as they judged it together."""

    round: int
    health: Health
    ranks: list[int]  # that hold the others up, the first few
    ended: list[int]  # to be replaced; all others keep their processes
    step: int
    seconds: float  # for which all stood still
    times: int  # that the workers were blocked at this step, one after another
    reason: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values | {"health": Health(values["health"])})


@dataclass(frozen=True)
class Beat:
    """A worker's report about itself, once a second."""

    place: Place
    num_moves: int  # grows with every change of place and every step
    usual_step_s: float | None  # median of its recent steps
    waits_for: list[Waits]
    stack: list[str]  # of the training thread, the innermost frame last
    hang: Hang | None = None  # that this worker's watchdog has to act on

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        hang = values["hang"]
        typed = {
            "place": Place(values["place"]),
            "waits_for": [*map(Waits, values["waits_for"])],
            "hang": Hang.from_json(hang) if hang else None,
        }
        return cls(**values | typed)


def health(beat: Beat, *, silent_s: float, unmoved_s: float, hang_timeout_s: float) -> Health:
    """Returns the state of a worker, `silent_s` after its last beat and `unmoved_s` after its last
    move."""
    if silent_s >= hang_timeout_s:
        return Health.SILENT
    if beat.place is Place.AROUND or Waits.STORAGE in beat.waits_for:
        return Health.WELL
    deadline_s = own_work_deadline_s(
        beat.place, beat.usual_step_s or 0.0, hang_timeout_s=hang_timeout_s
    )
    is_waiting = Waits.WORKERS in beat.waits_for
    if unmoved_s < (_FORSAKEN_FACTOR if is_waiting else 1) * deadline_s:
        return Health.WELL
    return Health.FORSAKEN if is_waiting else Health.STUCK


def own_work_deadline_s(
    place: Place, usual_step_s: float, *, hang_timeout_s: float, step_factor: float = _STEP_FACTOR
) -> float:
    """Returns how long a worker may do its own work without a move; `usual_step_s` is 0 where it is
    not known."""
    is_usual = place is Place.STEP and usual_step_s > 0
    factor = _STUCK_FACTOR if is_usual else _UNKNOWN_FACTOR
    return max(factor * hang_timeout_s, step_factor * usual_step_s)


def report(
    beat: Beat, verdict: Health, *, rank: int, pid: int, silent_s: float, unmoved_s: float
) -> str:
    """Returns the text that is kept of a hang."""
    stats = {
        path.parent.name: path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")
    }
    states = "".join(
        f"  thread {thread}: {stat.rpartition(') ')[2][:1]}\n" for thread, stat in stats.items()
    )
    return (
        f"rank {rank}, process {pid}: {verdict}, at {beat.place}, {silent_s:.1f} s without a sign of life, "
        f"{unmoved_s:.1f} s without a move\nkernel states of its threads (T is stopped by a signal):\n{states}"
        f"training thread at its last sign of life, innermost frame last:\n{''.join(beat.stack)}"
    )


def watch(run_uri: str, *, rank: int, hang_timeout_s: float, pid: int, pipe: int) -> None:
    """Reads beats from the pipe until it ends with the worker, or kills the worker."""
    known: Hang | None = None
    beat, rest = Beat(Place.AROUND, 0, None, [], []), b""
    beaten_at = moved_at = time.monotonic()
    while True:
        if select.select([pipe], [], [], _POLL_S)[0]:
            data = os.read(pipe, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                before, beat = beat, Beat.from_json(json.loads(line))
                beaten_at = time.monotonic()
                moved_at = moved_at if beat.num_moves == before.num_moves else beaten_at
        now = time.monotonic()
        since = {"silent_s": now - beaten_at, "unmoved_s": now - moved_at}
        if beat.hang is not None and beat.hang != known:
            known = beat.hang
            text = report(beat, known.health, rank=rank, pid=pid, **since)
            fields = {
                "seconds": known.seconds,
                "reason": known.reason,
                "ranks": known.ranks,
                "step": known.step,
            }
            if rank in known.ended:
                os.kill(pid, signal.SIGKILL)
                keep(run_uri, text, rank=rank, health=known.health, **fields)
                return
            kept = partial(keep, run_uri, text, rank=rank, health=known.health, **fields)
            # Beside the watch, as an outage may last
            threading.Thread(target=kept, daemon=True).start()
        verdict = health(beat, hang_timeout_s=hang_timeout_s, **since)
        if verdict is not Health.WELL:
            break
    text = report(beat, verdict, rank=rank, pid=pid, **since)
    os.kill(pid, signal.SIGKILL)  # before anything that could hang itself
    keep(
        run_uri,
        text,
        rank=rank,
        health=verdict,
        seconds=round(max(since.values()), 1),
        reason=_REASONS[verdict],
    )


def keep(run_uri: str, text: str, *, rank: int, health: Health, **fields: Any) -> None:
    """Keeps the text of a worker's hang in the run's storage, and notes the hang, as soon as the
    storage allows it."""
    run = open_storage(run_uri)
    name = f"{HANGS}/{time.time_ns()}-rank-{rank}-{health}.txt"
    patiently(lambda: run.write_bytes(name, text.encode()), name)
    patiently(lambda: note(run, "hang", rank=rank, health=health, stack=name, **fields), name)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, uri, number, timeout_s = sys.argv
    watch(
        uri,
        rank=int(number),
        hang_timeout_s=float(timeout_s),
        pid=os.getppid(),
        pipe=sys.stdin.fileno(),
    )
