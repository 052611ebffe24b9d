"""The training loop that every worker runs: one attempt, from the newest state to the end or to a failure."""

import math
from typing import Any

from cluster.config import max_steps
from jobs.attempt import Attempt
from jobs.run_plan import TOKENIZING_FAILED, RunPlan
from jobs.step_timer import StepTimer
from jobs.worker_group import WorkerGroup


def train(plan: RunPlan, *, rank: int, world_size: int) -> None:
    """Trains to the end of the run, or until a worker is lost: then the next attempt goes on from a checkpoint."""
    if plan.growing and plan.run.exists(TOKENIZING_FAILED):
        return  # a failed attempt is started again, but not for this reason, which the driver tells
    attempt = Attempt(plan, WorkerGroup(rank, world_size))
    if attempt.is_hopeless():
        return
    config = plan.config
    for step in range(attempt.first_step, max_steps(config) + 1):
        timer = StepTimer()
        summed = attempt.gradient.of_step(step, timer)  # (P + 1,)
        rate = attempt.rate(step)
        with timer.phase("update"):
            loss, norm = attempt.state.apply(summed, learning_rate=rate)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"step {step} has loss {loss} and gradient norm {norm}: lower train.learning_rate")
        is_last = step == max_steps(config)
        validation: dict[str, Any] = {}
        if is_last or step % config.train.eval_every_steps == 0:
            with timer.phase("validation"):
                validation = attempt.validate(step)
        attempt.record(step, timer, loss=loss, lr=rate, grad_norm=norm)
        if is_last or step % config.checkpoint.save_every_steps == 0:
            attempt.save(step, validation)
    attempt.finish()
