"""Writes each step into the ledger: its line, and now and then the phases of all ranks and the
norms of all layers."""

import time
from typing import Any

import torch

from cluster.settings.run import batch_schedule, seq_len
from jobs.exact.audited_gradient import AuditedStep
from jobs.run.run_plan import RunPlan
from jobs.sentinel.consequences import AuditedAttempt
from jobs.sentinel.proven_part import NOT_AUDITED, ProvenPart
from jobs.training.layer_statistics import LayerStatistics
from jobs.training.rank_phases import WINDOW_STEPS, RankPhases, as_fields
from jobs.training.run_writer import RunWriter
from model.hardware.gpus import gpu_of
from model.operations import compilations
from raymill.state.stored_state import hash_of_weights
from raymill.state.train_state import TrainState
from raymill.step_timer import CudaClock, StepTimer
from raymill.workers.worker_group import WorkerGroup

_NOT_TRAINING = ("validation", "checkpoint")


class StepRecord:
    """Measures on every rank; rank 0, which has the writer, writes."""

    def __init__(
        self,
        plan: RunPlan,
        state: TrainState,
        group: WorkerGroup,
        attempt: AuditedAttempt,
        *,
        writer: RunWriter | None,
    ) -> None:
        train = plan.config.train
        self._config, self._state, self._group = plan.config, state, group
        self._ledger = writer.ledger if writer else None
        self._budget = writer.budget if writer else None
        self._attempt, self._nodes = attempt.number, attempt.nodes
        self._last_step = plan.last_step
        self._schedule = batch_schedule(plan.config)
        self.line: dict[str, Any] | None = None
        """The last step's line, which every rank has; None where the step was skipped."""
        self._phases = RankPhases(group)
        self.timer = StepTimer(
            CudaClock() if state.device.type == "cuda" else None,
            num_compiled=lambda: compilations.number,
        )
        self.layers = LayerStatistics(
            state, group, self.timer, every_steps=train.layer_statistics_every_steps
        )

    def write(
        self,
        step: int,
        measured: AuditedStep,
        *,
        lr: float,
        skipped: str = "",
        proven: ProvenPart = NOT_AUDITED,
    ) -> None:
        """Writes the line of a completed step, which covers the time since the line before, and how
        far the run is proven.

        A step whose update was not applied, for the reason `skipped`, gets an event instead.
        """
        fields: dict[str, Any] = proven.fields()
        hash_every = self._config.train.hash_every_steps
        if hash_every and step % hash_every == 0 and (self._ledger or self._state.gathered):
            with self.timer.phase("statistics"):
                fields["parameter_hash"] = (
                    hash_of_weights(self._state, self._group, step=step) or None
                )
        if measured.audit_s is not None:
            fields["audit_seconds"] = round(measured.audit_s, 6)
        took = self.timer.take()
        self._phases.add(took)
        if took.processor_s is not None:
            fields["processor_s"] = round(took.processor_s, 6)
        fields |= self._budget.fields() if self._budget else {}
        schedule, batch = self._schedule, self._schedule.samples(step)
        samples = [batch.start, batch.stop]
        if skipped:
            self.line = None
            if self._ledger:
                self._ledger.event(
                    "skip", step=step, samples=samples, reason=skipped, attempt=self._attempt
                )
            return
        training_s = took.wall_s - sum(took.seconds.get(n, 0.0) for n in _NOT_TRAINING)
        tokens_per_s = schedule.step_tokens(step) / training_s
        self.line = {
            "time": round(time.time(), 3),
            "step": step,
            "tokens_seen": schedule.tokens_seen(step),
            "samples": samples,
            "lr": lr,
            "loss": measured.loss,
            "grad_norm": measured.norm,
            "world_size": self._group.world_size,
            "attempt": self._attempt,
            "seconds": {name: round(value, 6) for name, value in took.seconds.items()},
            "wall_s": round(took.wall_s, 6),
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": self._mfu(tokens_per_s),
            **fields,
        }
        if self._ledger is None:
            return
        self._ledger.step(**self.line)
        if self.layers.fields:
            self._ledger.event("layers", step=step, **self.layers.fields)

    def compare_ranks(self, step: int) -> None:
        """Records every few steps how long each rank takes. All ranks call this after every step,
        once its state is kept: where one is lost meanwhile, the others have that state."""
        if step % WINDOW_STEPS and step != self._last_step:
            return
        ranks = self._phases.close_window()
        if self._ledger:
            self._ledger.event("phases", step=step, attempt=self._attempt, **as_fields(ranks))
            for rank, ratio in self._phases.new_stragglers(ranks).items():
                self._ledger.event(
                    "straggler", step=step, rank=rank, node=self._nodes[rank], ratio=round(ratio, 3)
                )

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Returns the share of the GPUs' peak that the model's arithmetic uses; None where no peak
        is known."""
        device = self._state.device
        gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if gpu is None:
            return None
        flops_per_s = tokens_per_s * self._config.model.flops_per_token(seq_len(self._config))
        return flops_per_s / (gpu.peak_flops_per_s * self._group.world_size)
