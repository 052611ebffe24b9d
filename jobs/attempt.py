"""One worker's part of an attempt at a run: how it begins, what it writes down, what it saves."""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cluster.config import max_steps, seq_len, tokens_per_step
from cluster.local import NODE_NAME_VARIABLE
from jobs.batch_gradient import BatchGradient
from jobs.checkpoints import RunCheckpoints, checkpoint_name
from jobs.ledger import Ledger, LedgerWriter
from jobs.run_plan import RunPlan, open_stream, warmup_tokens
from jobs.step_timer import StepTimer
from jobs.train_state import TrainState
from jobs.validation import Validation
from jobs.worker_group import WorkerGroup
from model.checkpoint import Metadata, load_model, read_metadata, read_train_state, write_checkpoint
from model.flops import flops_per_token, peak_flops_per_s
from model.gpt import GPT
from model.optimizer import learning_rate
from model.tokenizer import Tokenizer

MAX_FRUITLESS_ATTEMPTS = 6
"""Attempts in a row that get no further than the ones before, after which the run gives up."""


class Attempt:
    """One worker's model and rows, and on rank 0 the pen that writes the ledger and the checkpoints."""

    def __init__(self, plan: RunPlan, group: WorkerGroup) -> None:
        config = plan.config
        torch.set_num_threads(config.scaling.threads_per_worker)
        torch.use_deterministic_algorithms(config.train.exact)
        self.plan, self.group = plan, group
        self.tokenizer = Tokenizer.from_json(plan.tokenizer_json)
        self.checkpoints = RunCheckpoints(plan.run)
        # Rank 0 chooses the checkpoint for all: another rank might see a newer or a damaged one.
        chosen = group.broadcast(self._newest_checkpoint() if group.rank == 0 else None)
        with tempfile.TemporaryDirectory(prefix="raymill-resume-") as scratch:
            self.first_step = 1 + self._restore(chosen, Path(scratch))
        self.train_rows, val_rows = open_stream(plan, "train"), open_stream(plan, "val")
        eot_id = self.tokenizer.eot_id if config.train.document_mask else None
        self.gradient = BatchGradient(config, self.state, self.train_rows, group, eot_id=eot_id)
        self.validation = Validation(config, self.state, val_rows, group, eot_id=eot_id)
        self.ledger = LedgerWriter(plan.run) if group.rank == 0 else None
        before = Ledger.read(plan.run) if group.rank == 0 else Ledger([])
        self._is_hopeless = group.broadcast(before.fruitless_attempts() >= MAX_FRUITLESS_ATTEMPTS)
        self.attempt = 1 + len(before.world_sizes)
        workers = group.gather({"pid": os.getpid(), "node": os.environ.get(NODE_NAME_VARIABLE, socket.gethostname())})
        if self.ledger and not self._is_hopeless:
            self.ledger.event(
                "start",
                attempt=self.attempt,
                world_size=group.world_size,
                step=self.first_step - 1,
                checkpoint=chosen,
                workers=workers,
            )

    def is_hopeless(self) -> bool:
        """Whether the attempts before this one got nowhere; recorded for the driver to tell."""
        if self.ledger and self._is_hopeless:
            self.ledger.event("gave_up", attempts=MAX_FRUITLESS_ATTEMPTS, step=self.first_step - 1)
        return self._is_hopeless

    def rate(self, step: int) -> float:
        train = self.plan.config.train
        return learning_rate(
            step * tokens_per_step(self.plan.config),
            peak=train.learning_rate,
            warmup_tokens=warmup_tokens(self.plan.config),
            decay_tokens=train.decay_tokens or train.max_tokens,
            min_ratio=train.min_learning_rate_ratio,
        )

    def validate(self, step: int) -> dict[str, Any]:
        """The figures of the validation, which the ledger gets with samples."""
        figures = self.validation.measure()
        if self.ledger:
            self.ledger.event("validation", step=step, **figures, samples=self.validation.samples(self.tokenizer))
        return figures

    def record(self, step: int, timer: StepTimer, *, loss: float, lr: float, grad_norm: float) -> None:
        if self.ledger is None:
            return
        config, wall_s = self.plan.config, timer.wall_s()
        batch = config.train.global_batch_size
        training_s = wall_s - timer.seconds.get("validation", 0.0)
        tokens_per_s = tokens_per_step(config) / training_s
        self.ledger.step(
            step=step,
            tokens_seen=step * tokens_per_step(config),
            samples=[(step - 1) * batch, step * batch],
            lr=lr,
            loss=loss,
            grad_norm=grad_norm,
            world_size=self.group.world_size,
            attempt=self.attempt,
            seconds={name: round(value, 6) for name, value in timer.seconds.items()},
            wall_s=round(wall_s, 6),
            tokens_per_s=round(tokens_per_s, 1),
            mfu=self._mfu(tokens_per_s),
        )

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Share of the GPUs' known peak that the model's arithmetic uses; None where no peak is known."""
        if self.state.device.type != "cuda":
            return None
        peak = peak_flops_per_s(torch.cuda.get_device_name(self.state.device))
        if peak is None:
            return None
        config = self.plan.config
        return tokens_per_s * flops_per_token(config.model, seq_len(config)) / (peak * self.group.world_size)

    def save(self, step: int, validation: dict[str, Any]) -> None:
        """Rank 0 writes the checkpoint; the others go on and wait for it in the next step's exchange."""
        if self.ledger is None:
            return
        config, manifest, start = self.plan.config, self.train_rows.manifest, time.perf_counter()
        metadata = Metadata(
            run_id=str(config.run_id),
            step=step,
            tokens_seen=step * tokens_per_step(config),
            data_manifest_hash=manifest.hash if manifest.complete else None,
            data_identity=manifest.identity,
            code_version=self.plan.code_version,
            **validation,
        )

        def write(folder: Path) -> None:
            nonlocal metadata
            metadata = write_checkpoint(
                folder,
                model=self.state.model,
                tokenizer=self.tokenizer,
                metadata=metadata,
                train_state=self.state.moments(),
            )

        self.checkpoints.save(checkpoint_name(step), write)
        self.ledger.event(
            "checkpoint",
            step=step,
            checkpoint=self.checkpoints.uri(checkpoint_name(step)),
            parameter_hash=metadata.parameter_hash,
            seconds=round(time.perf_counter() - start, 6),
        )
        self.checkpoints.thin_out(num_to_keep=config.checkpoint.num_to_keep, pinned=set(self.plan.pinned))

    def finish(self) -> None:
        if self.ledger:
            self.ledger.event("finish", step=max_steps(self.plan.config))

    def _newest_checkpoint(self) -> str | None:
        with tempfile.TemporaryDirectory(prefix="raymill-newest-") as scratch:
            folder = self.checkpoints.load_newest(Path(scratch))
            return folder.name if folder else None

    def _restore(self, name: str | None, scratch: Path) -> int:
        """Fresh weights or the checkpoint's; returns the step it was taken at."""
        config = self.plan.config
        device = torch.device("cuda", torch.cuda.current_device()) if config.scaling.use_gpu else torch.device("cpu")
        if name is None:
            model = GPT(config.model)
            model.init_weights(config.train.seed)
            self.state = TrainState(model, config.train, device=device)
            return 0
        folder = self.checkpoints.fetch(name, scratch)
        model = load_model(folder, verify=False).train()  # loaded for inference: without dropout
        self.state = TrainState(model, config.train, device=device)
        self.state.load_moments(read_train_state(folder))
        return read_metadata(folder).step
