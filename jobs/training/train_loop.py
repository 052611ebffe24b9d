"""The training loop that every worker runs: one attempt, from the newest state to the end or to a
failure."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from cluster.settings.run import max_steps
from jobs.run.end import End
from jobs.run.run_plan import RunPlan
from jobs.training.attempt import Attempt
from jobs.training.guards import Verdict
from jobs.training.kernels import SelfTest
from jobs.training.open_attempt import open_attempt
from jobs.training.sentinel import CorruptionError
from jobs.workers.failures import is_lost_peer
from jobs.workers.heartbeat import Pulse
from jobs.workers.new_meeting import new_meeting
from jobs.workers.preemption import Notice, Signals
from jobs.workers.watchdog import Place
from model.files.failpoints import pause
from raymill.workers.worker_group import Meeting, WorkerGroup


def train(
    plan: RunPlan,
    *,
    rank: int,
    world_size: int,
    meeting: Meeting | None = None,
    pulse: Pulse | None = None,
    signals: Callable[[], Signals | None] = lambda: None,
    self_test: SelfTest | None = None,
) -> End:
    """Trains until something ends the run, or a worker is lost: then the next attempt continues from
    the newest state.

    `meeting` is the round in which the workers met. `pulse` shows a watchdog where this worker is.
    `signals` returns what changes when its process is warned of its end. `self_test` is this
    worker's, if it has had one.
    """
    group = WorkerGroup(rank, world_size, meeting or new_meeting())
    pulse = pulse or Pulse({})
    pulse.meeting = group.meeting
    with last_attempt(plan, group, pulse, signals, self_test) as (end, _):
        return end


@contextmanager
def last_attempt(
    plan: RunPlan,
    group: WorkerGroup,
    pulse: Pulse,
    signals: Callable[[], Signals | None] = lambda: None,
    self_test: SelfTest | None = None,
) -> Iterator[tuple[End, Attempt | None]]:
    """Makes attempts until one does not go back: a rollback is a restart without Ray Train. Yields
    what ended the last one, and that attempt with its state; None where it could not begin."""
    self_test = self_test or SelfTest(plan)
    end = End.WENT_BACK
    while end is End.WENT_BACK:
        gc.collect()  # what refers to itself of the attempt before, which takes as much memory
        with ExitStack() as opened:
            attempt = open_attempt(plan, group, opened, signals=signals, self_test=self_test)
            if attempt is None:
                yield End.GAVE_UP, None
                return
            end = _all_steps(attempt, pulse)
            if end is not End.WENT_BACK:
                yield end, attempt
        del attempt
        self_test.forget()


def _all_steps(attempt: Attempt, pulse: Pulse) -> End:
    """Takes steps, and stores what has to outlive the attempt, however it ends."""
    try:
        end = take_steps(attempt, pulse)
        attempt.close(end)
        return end
    except CorruptionError:
        attempt.close(None)
        raise
    except RuntimeError as error:
        if is_lost_peer(error):
            attempt.snapshots.rescue(attempt.state)
        raise


def take_steps(attempt: Attempt, pulse: Pulse) -> End:
    """Takes steps until something ends the attempt."""
    config, timer = attempt.plan.config, attempt.record.timer
    last_step = max_steps(config)
    step, notice = attempt.first_step, Notice.NONE
    while step <= attempt.plan.last_step:
        pulse.at(Place.STEP if step > attempt.first_step else Place.FIRST_STEP)
        pause("step")
        attempt.enter(step)
        measured = attempt.measure(step)
        if measured is None:
            return End.WENT_BACK
        decision = attempt.update(step, measured)
        if decision is None:
            return End.WENT_BACK
        if decision.verdict in (Verdict.ROLL_BACK, Verdict.STOP):
            return attempt.leave(step, decision)
        attempt.guard = decision.state
        if attempt.sentinel.goes_back_after(step):
            return End.WENT_BACK

        validation: dict[str, Any] = {}
        if attempt.is_validated(step):
            pulse.at(Place.VALIDATION)
            with timer.phase("validation"):
                validation = attempt.validator.validate(
                    step, moves=partial(pulse.at, Place.VALIDATION)
                )
        rate = attempt.rate(step)
        proven = attempt.sentinel.proven
        attempt.record.write(step, measured, lr=rate, skipped=decision.reason, proven=proven)
        if step != last_step:  # a run is not done before its last checkpoint is
            with timer.phase("snapshot"):
                attempt.keep(step, validation)
        # From here on the state has a line: whatever other worker is lost, the next attempt
        # continues after this step.
        attempt.record.compare_ranks(step)
        notice = attempt.answer(step)
        if attempt.is_saved(step) or notice:
            pulse.at(Place.SAVE)
            with timer.phase("checkpoint"):
                attempt.save(step, validation, must=step == last_step or notice >= Notice.LAST)
        if notice and notice is not Notice.BUDGET:
            attempt.tell_of(notice, step=step)
        if notice is Notice.LAST:
            attempt.notices.wait_for_end(moves=partial(pulse.at, Place.SAVE))
        if notice >= Notice.STOP:
            break
        step, attempt.guard = attempt.guard.entering(step + 1)
    pulse.at(Place.AROUND)
    if min(step, attempt.plan.last_step) == last_step:
        return End.FINISHED
    return End.SPENT if notice is Notice.BUDGET else End.STOPPED
