"""Says how fast a run on CPUs takes its steps, as the last run like it in the storage did."""

import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.settings.run import RunConfig, batch_schedule, seq_len
from cluster.storage.uris import open_storage
from jobs.run.history import recorded_config
from jobs.run.ledger import LEDGER, Ledger, Line
from model.config import shape_differences
from model.hardware.processor import processor_share
from raymill.errors import UserError

NUM_STEPS = 10
"""Steps from which on a pace is one."""

_MAX_STEPS = 100  # that are looked at: the last ones
_MAX_RUNS = 20  # that are looked at: the newest ones
_LIKE_SIZE = 0.1  # a vocabulary is known when the corpus has been read

_OF_TRAIN = (
    "global_batch_size",
    "micro_batch_size",
    "micro_batches_per_lane",
    "batch_ramp_start",
    "optimizer",
    "exact",
    "recompute",
    "compute",
    "document_mask",
    "lora_rank",
    "precision",
)
_OF_SCALING = ("max_workers", "threads_per_worker", "use_gpu", "shard", "shard_group")
"""Settings on which the time of a step depends."""


@dataclass(frozen=True)
class Pace:
    """How fast the steps of the whole batch are taken."""

    step_s: float
    timed: str  # in words: which steps
    processor: float  # share of a processor that a worker had while it computed


def recorded_pace(config: RunConfig) -> Pace | None:
    """Returns the pace of the newest run in a storage of this machine that has the same shape,
    batch and workers; None where there is none. The precision is settled."""
    runs = open_storage(config.storage.uri).child("runs")
    if runs.local_path("") is None:
        return None
    ledgers = [entry.key for entry in runs.list() if entry.key.endswith(f"/{LEDGER}")]
    newest_first = sorted(ledgers, key=lambda key: _changed_s(runs.local_path(key)), reverse=True)
    for key in newest_first[:_MAX_RUNS]:
        run = runs.child(key.removesuffix(f"/{LEDGER}"))
        with suppress(UserError):  # of another version, or damaged
            if run.uri.count("/") == runs.uri.count("/") + 1 and _is_like(
                recorded_config(run), config
            ):
                pace = _pace(Ledger.read(run), config, run.uri.rpartition("/")[2])
                if pace is not None:
                    return pace
    return None


def _changed_s(path: Path | None) -> float:
    assert path is not None, "the storage is a folder"
    return path.stat().st_mtime


def _is_like(before: RunConfig, now: RunConfig) -> bool:
    """Reports whether the steps of both take as long."""
    if shape_differences(before.model, now.model).keys() - {"vocab_size"}:
        return False
    size = now.model.num_parameters
    return (
        abs(before.model.num_parameters - size) <= _LIKE_SIZE * size
        and seq_len(before) == seq_len(now)
        and before.cluster.address == now.cluster.address
        and all(getattr(before.train, name) == getattr(now.train, name) for name in _OF_TRAIN)
        and all(getattr(before.scaling, name) == getattr(now.scaling, name) for name in _OF_SCALING)
    )


def _pace(ledger: Ledger, config: RunConfig, run_id: str) -> Pace | None:
    steps = [line for line in ledger.steps if line["world_size"] == config.scaling.max_workers][
        -_MAX_STEPS:
    ]
    if len(steps) < NUM_STEPS:
        return None
    schedule = batch_schedule(config)
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in steps)
    return Pace(
        step_s=schedule.step_tokens(schedule.max_steps) / tokens_per_s,
        timed=f"the last {len(steps)} steps of run {run_id}",
        processor=_processor(steps),
    )


def _processor(steps: list[Line]) -> float:
    """Returns the mean share of a processor that rank 0 had."""
    return statistics.fmean(
        processor_share(line.get("processor_s"), line["seconds"]) for line in steps
    )
