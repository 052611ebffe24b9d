"""Sends a worker's sign of life to its watchdog each second: its place in the loop and its training
thread's stack."""

import json
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import ModuleType

from cluster.settings.code_folders import CODE_ROOT
from jobs.workers.new_meeting import new_meeting
from jobs.workers.watchdog import Beat, Hang, Place, Waits
from model.operations import compilations

BEAT_S = 1.0

_NUM_FRAMES = 24
_NUM_STEPS = 64

WaitingPlaces = Mapping[Waits, Sequence[ModuleType]]
"""The modules or packages for each kind of waiting: a stack with a frame in one of them waits in
that way."""


class Pulse:
    """The place of the training thread, recorded whether or not a watchdog looks."""

    def __init__(self, waiting_places: WaitingPlaces) -> None:
        self._waiting_places = waiting_places
        self._place, self._num_moves = Place.AROUND, 0
        self.num_steps = 0  # completed, but for those that an attempt ended with
        self.meeting = new_meeting()  # in which this worker takes part
        self.hang: Hang | None = None  # on which this worker's watchdog has to act
        self._step_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._step_start: float | None = None
        self._num_compiled = 0  # graphs, before the place was reached
        self._thread_id = threading.get_ident()

    def at(self, place: Place) -> None:
        """Records what the training thread is about to do."""
        now = time.monotonic()
        if place is Place.STEP:
            self.num_steps += 1
            # No validation or checkpoint in between
            if self._place_now is Place.STEP and self._step_start is not None:
                self._step_s.append(now - self._step_start)
            self._step_start = now
        self._place, self._num_moves = place, self._num_moves + 1
        self._num_compiled = compilations.number

    @property
    def _place_now(self) -> Place:
        """A step that compiles takes as long as a first one."""
        compiles = compilations.number > self._num_compiled
        return Place.FIRST_STEP if compiles and self._place is Place.STEP else self._place

    def beat(self) -> Beat:
        innermost = sys._current_frames().get(self._thread_id)
        stack = traceback.extract_stack(innermost)[-_NUM_FRAMES:] if innermost else []
        files = [Path(frame.filename) for frame in stack]
        places = self._waiting_places.items()
        waits_for = [
            waits for waits, modules in places if any(_is_in(file, modules) for file in files)
        ]
        usual = median(list(self._step_s)) if self._step_s else None
        if Waits.WORKERS not in waits_for and self.meeting.is_waiting():
            waits_for.append(Waits.WORKERS)
        num_moves = self._num_moves + self.meeting.progress.num_marks()
        return Beat(
            self._place_now, num_moves, usual, waits_for, traceback.format_list(stack), self.hang
        )


def _is_in(file: Path, modules: Sequence[ModuleType]) -> bool:
    places = [Path(str(module.__file__)) for module in modules]
    return any(
        file.is_relative_to(place.parent if place.name == "__init__.py" else place)
        for place in places
    )


@contextmanager
def watched(
    run_uri: str, *, rank: int, hang_timeout_s: float, waiting_places: WaitingPlaces
) -> Iterator[Pulse]:
    """Runs a watchdog beside this process while the context lasts. A timeout of 0 runs none."""
    pulse = Pulse(waiting_places)
    if not hang_timeout_s:
        yield pulse
        return
    command = [
        sys.executable,
        "-m",
        "jobs.workers.watchdog",
        run_uri,
        str(rank),
        str(hang_timeout_s),
    ]
    # In its own session, it is spared by a signal that stops the worker's process group.
    watchdog = subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=CODE_ROOT, start_new_session=True
    )
    assert watchdog.stdin is not None
    pipe, ended = watchdog.stdin, threading.Event()

    def beat() -> None:
        try:
            while not ended.wait(BEAT_S):
                pipe.write(json.dumps(asdict(pulse.beat())).encode() + b"\n")
                pipe.flush()
        except BrokenPipeError:
            sys.stderr.write(f"rank {rank} continues without its watchdog, which ended\n")

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        ended.set()
        thread.join(BEAT_S)
        watchdog.terminate()
        watchdog.wait()
        pipe.close()
