"""Simulates a run on nodes that come and go as in a trace: which steps it takes when, and what becomes
of the rest of the time.

It knows numbers of workers and seconds alone. Each second until the run's end is of one kind:

    steps       of steps that count
    lost        of steps that count for nothing: one under way when the workers change, or one that
                no node has any more
    recovery    from a change of the workers to the next step
    waiting     with fewer workers than the run needs
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

StepSeconds = Callable[[int], float]
"""The time of a step by the number of workers."""

_NEARLY = 1e-9  # of a step, by which sums of seconds may be wrong


@dataclass(frozen=True)
class Recovery:
    """What a change of the workers takes, in seconds."""

    see_s: float  # until a run sees a node that has come; it trains on meanwhile
    detect_s: float  # until the others know that a node is gone, if nobody announced it
    meet_s: float  # until the workers have met
    load_s: float  # until each has its state, and the first step begins
    has_notices: bool  # a node is announced to go: what it alone has is saved

    def pause_s(self, before: int, now: int) -> float:
        """Returns the seconds without a step after a change."""
        is_lost = 0 < now < before
        detect_s = self.detect_s if is_lost and not self.has_notices else 0.0
        return detect_s + self.meet_s + self.load_s


@dataclass
class Simulated:
    """What a run does with the time until it is done, or until the trace ends."""

    steps: int = 0  # that count
    is_done: bool = False
    wall_s: float = 0.0
    steps_s: float = 0.0
    steps_worker_s: float = 0.0  # the same, of all workers together
    lost_s: float = 0.0
    recovery_s: float = 0.0
    waiting_s: float = 0.0
    num_resizes: int = 0  # from some workers to other ones
    num_returns: int = 0  # from too few workers, after the first start
    lost_steps: int = 0  # whole ones, taken again
    timeline: list[tuple[float, float, int]] = field(default_factory=list)  # (start, end, workers)


def simulate(
    intervals: Iterator[tuple[float, float, int]],
    step_s: StepSeconds,
    recovery: Recovery,
    *,
    num_steps: int,
    save_every_steps: int,
) -> Simulated:
    """Takes a run's steps in intervals (start, end, workers), where 0 stands for too few workers."""
    run = _Run(Simulated(), step_s, recovery, num_steps, save_every_steps)
    for start, end, workers in merged(intervals):
        run.pass_through(start, end, workers)
        if run.result.is_done:
            break
    return run.result


def merged(intervals: Iterator[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Returns the intervals with neighbors of as many workers as one."""
    stretches: list[tuple[float, float, int]] = []
    for start, end, workers in intervals:
        if stretches and stretches[-1][2] == workers:
            stretches[-1] = (stretches[-1][0], end, workers)
        else:
            stretches.append((start, end, workers))
    return stretches


@dataclass
class _Run:
    result: Simulated
    step_s: StepSeconds
    recovery: Recovery
    num_steps: int
    save_every_steps: int
    workers: int = 0  # of the group that trains
    ready_s: float = 0.0  # when that group takes its first step
    has_begun: bool = False
    # The time and the workers of each step that counts and is in no checkpoint yet
    unsaved: list[tuple[float, int]] = field(default_factory=list)

    def pass_through(self, start: float, end: float, workers: int) -> None:
        """Spends an interval; it ends with the run's last step, if that is in it."""
        before, result = self.workers, self.result
        if workers == 0:
            if before and not self.recovery.has_notices:
                self._forget_unsaved()
            result.waiting_s += end - start
            self._pass(start, end, 0)
            return
        now_s = start
        if workers > before > 0:
            seen_s = min(end, start + self.recovery.see_s)
            now_s = self._recover(start, seen_s, until_s=self.ready_s, workers=before)
            now_s = self._train(now_s, seen_s, before)
            if result.is_done or now_s >= end:
                return
        result.num_resizes += before > 0
        result.num_returns += before == 0 and self.has_begun
        self.ready_s = now_s + self.recovery.pause_s(before, workers)
        now_s = self._recover(now_s, end, until_s=self.ready_s, workers=workers)
        self.has_begun = True
        self._train(now_s, end, workers)

    def _recover(self, start: float, end: float, *, until_s: float, workers: int) -> float:
        """Waits until the workers are ready, if they are not, or for the end. Returns when."""
        stop = min(end, max(start, until_s))
        self.result.recovery_s += stop - start
        self._pass(start, stop, workers)
        return stop

    def _train(self, start: float, end: float, workers: int) -> float:
        """Takes the steps that fit, and loses the one that does not. Returns when it ends."""
        step_s, result = self.step_s(workers), self.result
        fit = math.floor((end - start) / step_s + _NEARLY)
        taken = min(fit, self.num_steps - result.steps)
        result.steps += taken
        result.steps_s += taken * step_s
        result.steps_worker_s += taken * step_s * workers
        result.is_done = result.steps == self.num_steps
        kept = result.steps % self.save_every_steps
        new = [(step_s, workers)] * min(taken, kept)
        self.unsaved = [*self.unsaved, *new][-kept:] if kept else []
        stop = start + taken * step_s if result.is_done else end
        result.lost_s += stop - start - taken * step_s
        self._pass(start, stop, workers)
        return stop

    def _forget_unsaved(self) -> None:
        """Loses the steps since the last checkpoint, as the last node is gone that had them."""
        for step_s, workers in self.unsaved:
            self.result.steps -= 1
            self.result.lost_steps += 1
            self.result.steps_s -= step_s
            self.result.steps_worker_s -= step_s * workers
            self.result.lost_s += step_s
        self.unsaved = []

    def _pass(self, start: float, end: float, workers: int) -> None:
        self.workers = workers
        self.result.wall_s = end
        if end > start:
            self.result.timeline.append((start, end, workers))
