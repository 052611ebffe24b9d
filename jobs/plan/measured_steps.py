"""Measures what the steps of a run take on this machine's processors: a few lanes of random tokens
in this process, each with an update."""

import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cluster.output.progress import report_progress
from cluster.settings.run import RunConfig, batch_schedule, seq_len
from jobs.exact.compute import first_weights
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from jobs.plan.pace import NUM_STEPS, Pace
from model.decoders.make import new_decoder
from model.hardware.memory import keep_freed_memory
from model.hardware.processor import processor_share
from raymill.step_timer import StepTime, StepTimer
from raymill.workers.worker_group import WorkerGroup

_MOST_S = 15.0
"""Time after which no other step is measured."""

_LANE_FLOPS = 1.6e11
"""Operations of a measured lane at most, which a processor does in two to six seconds; of a larger
lane a part is measured."""

_LEAST_TOKENS = 16
_LANE = ("forward", "loss", "backward")


class _RandomRows:
    """Rows of random tokens, as a token store gives them."""

    def __init__(self, vocab_size: int, num_tokens: int) -> None:
        self._vocab_size, self._num_tokens = vocab_size, num_tokens
        self._random = torch.Generator().manual_seed(0)

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets (B, T)."""
        shape = len(indices), self._num_tokens + 1
        rows = torch.randint(self._vocab_size, shape, generator=self._random)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def read_ahead(self, indices: Any) -> None: ...


def measured_pace(config: RunConfig) -> Pace:
    """Returns the pace at which this machine takes steps, by lanes of one process; what workers
    exchange is not in it. The precision is settled, and nothing is sharded."""
    lane = _measured_lane(config)
    times = _measured(lane)
    schedule = batch_schedule(config)
    larger = _flops(config) / _flops(lane)
    lane_s = larger * statistics.fmean(_seconds(taken, _LANE) for taken in times)
    once_s = statistics.fmean(taken.wall_s - _seconds(taken, _LANE) for taken in times)
    workers = config.scaling.max_workers
    threads = workers * config.scaling.threads_per_worker
    turns = max(1.0, threads / len(os.sched_getaffinity(0)))
    return Pace(
        step_s=turns * (math.ceil(schedule.full_lanes / workers) * lane_s + once_s),
        timed=f"{len(times)} lanes here, without what workers exchange",
        processor=statistics.fmean(
            processor_share(taken.processor_s, taken.seconds) for taken in times
        ),
    )


def _measured_lane(config: RunConfig) -> RunConfig:
    """Returns the run with one lane a step, as much of it as is measured."""
    num_tokens = seq_len(config)
    most = _LANE_FLOPS / config.model.flops_per_token(num_tokens)
    rows = max(1, min(config.train.micro_batch_size, int(most / num_tokens)))
    if rows == 1:
        num_tokens = max(min(_LEAST_TOKENS, num_tokens), min(num_tokens, int(most)))
    train = {
        "global_batch_size": rows,
        "micro_batch_size": rows,
        "micro_batches_per_lane": 1,
        "batch_ramp_start": None,
        "batch_ramp_tokens": 0,
        "seq_len": num_tokens,
        "max_tokens": 1000 * rows * num_tokens,
        "document_mask": False,
    }
    branches = {
        "train": config.train.model_copy(update=train),
        "scaling": config.scaling.model_copy(update={"max_workers": 1, "min_workers": 1}),
    }
    return config.model_copy(update=branches)


def _flops(config: RunConfig) -> float:
    """Returns the operations of a lane."""
    num_tokens = batch_schedule(config).lane_tokens
    return float(num_tokens * config.model.flops_per_token(seq_len(config)))


def _measured(config: RunConfig) -> list[StepTime]:
    """Returns the times of steps after the first one, which is slower: of one at least."""
    with torch.device("meta"):
        model = new_decoder(config.model)
    group = WorkerGroup(rank=0, world_size=1)
    rows: Any = _RandomRows(config.model.vocab_size, seq_len(config))
    times: list[StepTime] = []
    began_s = time.monotonic()
    with _as_a_worker(config.scaling.threads_per_worker):
        state = run_state(model, config.train, device=torch.device("cpu"), group=group)
        gradient = step_gradient(config, state, rows, group, eot_id=None)
        try:
            state.load_weights(first_weights(config, config.train.seed))
            timer = StepTimer()
            while len(times) <= NUM_STEPS:
                measured = gradient.of_step(len(times) + 1, timer)
                with timer.phase("update"):
                    state.apply(norm=measured.norm, learning_rate=0.0)
                times.append(timer.take())
                report_progress("measuring", done=len(times), total=NUM_STEPS + 1, unit="lanes")
                if len(times) > 1 and time.monotonic() - began_s > _MOST_S:
                    break
        finally:
            gradient.close()
            state.close()
    return times[1:]


@contextmanager
def _as_a_worker(num_threads: int) -> Iterator[None]:
    """Has this process compute as a worker does while the context lasts."""
    keep_freed_memory()
    threads_before = torch.get_num_threads()
    mode_before = torch.get_deterministic_debug_mode()
    torch.set_num_threads(num_threads)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_deterministic_debug_mode(mode_before)


def _seconds(taken: StepTime, phases: tuple[str, ...]) -> float:
    return sum(taken.seconds.get(phase, 0.0) for phase in phases)
