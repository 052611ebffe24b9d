"""The training loop that every worker runs: one attempt, from the newest checkpoint to the end or to a failure.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is `num_lanes` micro-batches; the loss
of the step is the mean over all counted tokens of all lanes.
"""

import dataclasses
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.config import RunConfig, max_steps, num_lanes, seq_len, tokens_per_step
from cluster.local import NODE_NAME_VARIABLE
from cluster.storage import Storage, open_storage
from jobs.batch_plan import lane_sample_indices, lanes_of_rank, rows_of_samples
from jobs.checkpoints import RunCheckpoints, checkpoint_name
from jobs.exact_reduce import exchange, reduce_lanes
from jobs.ledger import Ledger, LedgerWriter
from jobs.token_stream import TokenStream
from jobs.train_state import TrainState
from model.checkpoint import Metadata, load_model, read_metadata, read_train_state, write_checkpoint
from model.flops import flops_per_token, peak_flops_per_s
from model.generate import generate
from model.gpt import GPT
from model.optimizer import learning_rate
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

MAX_FRUITLESS_ATTEMPTS = 6
"""Attempts in a row that get no further than the ones before, after which the run gives up."""


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What the driver settled before training: plain values, the same for every attempt and every worker."""

    config: RunConfig  # with the model's vocabulary and the run id filled in
    tokens_uri: str
    tokenizer_json: bytes
    code_version: str
    pinned: frozenset[str]  # names of published checkpoints of this run

    @property
    def run(self) -> Storage:
        return run_storage(self.config)


def run_storage(config: RunConfig) -> Storage:
    """Where the run keeps its ledger, checkpoints and report."""
    return open_storage(config.storage.uri).child(f"runs/{config.run_id}")


def warmup_tokens(config: RunConfig) -> int:
    """375M tokens as GPT-3 had, scaled down to 2% of runs that are shorter than 18.75B tokens."""
    if config.train.warmup_tokens is not None:
        return config.train.warmup_tokens
    return min(375_000_000, config.train.max_tokens // 50)


def train(plan: RunPlan, *, rank: int, world_size: int) -> None:
    """Trains to the end of the run, or until a worker is lost: then the next attempt goes on from a checkpoint."""
    attempt = Attempt(plan, rank=rank, world_size=world_size)
    if attempt.is_hopeless():
        return
    config, state = plan.config, attempt.state
    for step in range(attempt.first_step, max_steps(config) + 1):
        timer = PhaseTimer()
        summed = attempt.batch_gradient(step, timer)  # (P + 1,)
        rate = attempt.rate(step)
        with timer.phase("update"):
            loss, norm = state.apply(summed, learning_rate=rate)
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


class PhaseTimer:
    """Seconds of one step by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def wall_s(self) -> float:
        return time.perf_counter() - self._start


class Attempt:
    """One worker's share of one attempt: its model, its lanes, and on rank 0 the pen that writes the ledger."""

    def __init__(self, plan: RunPlan, *, rank: int, world_size: int) -> None:
        config = plan.config
        torch.set_num_threads(config.scaling.threads_per_worker)
        torch.use_deterministic_algorithms(config.train.exact)
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.tokenizer = Tokenizer.from_json(plan.tokenizer_json)
        tokens = open_storage(plan.tokens_uri)
        self.train_rows = TokenStream.open(tokens, split="train", seq_len=seq_len(config))
        self.val_rows = TokenStream.open(tokens, split="val", seq_len=seq_len(config))
        self.lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes(config))
        self.checkpoints = RunCheckpoints(plan.run)
        # Rank 0 chooses the checkpoint for all: another rank might see a newer or a damaged one.
        chosen = self._broadcast(self._newest_checkpoint() if rank == 0 else None)
        with tempfile.TemporaryDirectory(prefix="raymill-resume-") as scratch:
            self.first_step = 1 + self._restore(chosen, Path(scratch))
        self.ddp = None if config.train.exact else DistributedDataParallel(_LaneLoss(self.state.model))
        self.ledger = LedgerWriter(plan.run) if rank == 0 else None
        before = Ledger.read(plan.run) if rank == 0 else Ledger([])
        self._is_hopeless = self._broadcast(before.fruitless_attempts() >= MAX_FRUITLESS_ATTEMPTS)
        self.attempt = 1 + len(before.world_sizes)
        workers = self._gather({"pid": os.getpid(), "node": os.environ.get(NODE_NAME_VARIABLE, socket.gethostname())})
        if self.ledger and not self._is_hopeless:
            self.ledger.event(
                "start",
                attempt=self.attempt,
                world_size=world_size,
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

    def batch_gradient(self, step: int, timer: PhaseTimer) -> Tensor:
        """The gradient and, behind it, the loss of the whole batch (P + 1,), equal on every rank."""
        if self.ddp is not None:
            return self._ddp_gradient(step, timer)

        def lane_value(lane: int) -> Tensor:
            self._lane_backward(step, lane, timer, scale=1.0)
            return self.state.gradient.clone()

        sums = reduce_lanes(self.lanes, num_lanes=num_lanes(self.plan.config), lane_value=lane_value)
        with timer.phase("sync"):
            return exchange(sums, rank=self.rank, world_size=self.world_size, num_lanes=num_lanes(self.plan.config))

    def _ddp_gradient(self, step: int, timer: PhaseTimer) -> Tensor:
        """Stock DistributedDataParallel: local accumulation, one all-reduce overlapped with the last backward."""
        assert self.ddp is not None
        self.state.gradient.zero_()
        for lane in self.lanes:
            self.ddp.require_backward_grad_sync = lane == self.lanes[-1]
            # DDP takes the mean over ranks; this sum wants their total.
            self._lane_backward(step, lane, timer, scale=float(self.world_size), accumulate=True)
        with timer.phase("sync"):
            loss = self.state.gradient[-1] / self.world_size
            dist.all_reduce(loss)
            self.state.gradient[-1] = loss
        return self.state.gradient

    def _lane_backward(
        self, step: int, lane: int, timer: PhaseTimer, *, scale: float, accumulate: bool = False
    ) -> None:
        """Leaves `scale` times the lane's share of the batch's gradient and loss in the gradient buffer."""
        config, state = self.plan.config, self.state
        with timer.phase("load"):
            samples = lane_sample_indices(
                step - 1,
                lane,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.train.micro_batch_size,
            )
            rows = rows_of_samples(samples, seed=config.train.seed, num_rows=self.train_rows.num_rows)
            inputs, targets = (part.to(state.device) for part in self.train_rows.rows(rows))  # (B, T) each
        if not accumulate:
            state.gradient.zero_()
        # Dropout, if any, is a function of (seed, step, lane), whichever rank computes the lane.
        torch.manual_seed(hash((config.train.seed, step, lane)) % 2**63)
        with timer.phase("forward"), self._autocast():
            loss_of = self.ddp or _LaneLoss(state.model)
            loss = loss_of(inputs, targets) * (scale / tokens_per_step(config))
        with timer.phase("backward"):
            loss.backward()
        state.gradient[-1] += loss.detach()

    def _autocast(self) -> torch.autocast:
        enabled = self.plan.config.train.precision == "bf16"
        return torch.autocast(self.state.device.type, dtype=torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, Any]:
        """Loss (nats per token) and bits per byte over the validation rows, and samples: the same for any world."""
        config, model, manifest = self.plan.config, self.state.model, self.val_rows.manifest
        num_rows = min(self.val_rows.num_rows, max(1, config.train.eval_max_tokens // seq_len(config)))
        size = config.train.micro_batch_size
        batches = [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        # Each slot has one contributor, so the all-reduce adds zeros only, and rounds nothing.
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self.state.device)
        model.eval()
        for index in range(self.rank, len(batches), self.world_size):
            inputs, targets = (part.to(self.state.device) for part in self.val_rows.rows(batches[index]))
            with self._autocast():
                losses[index] = model.loss(inputs, targets).double()
        if self.world_size > 1:
            dist.all_reduce(losses)
        samples = self._samples() if self.rank == 0 else []
        model.train()
        loss = float(losses.sum()) / (num_rows * seq_len(config))
        tokens_per_byte = manifest.total("tokens", "val") / manifest.total("bytes", "val")
        values = {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) * tokens_per_byte}
        if self.ledger:
            self.ledger.event("validation", step=step, **values, samples=samples)
        return values

    def _samples(self) -> list[dict[str, str]]:
        config = self.plan.config
        samples = []
        for prompt in config.train.sample_prompts:
            prompt_ids = self.tokenizer.encode(prompt)
            room = config.model.n_positions - len(prompt_ids)
            new_ids = generate(
                self.state.model,
                prompt_ids,
                max_tokens=min(config.train.sample_tokens, room),
                params=SamplingParams(temperature=0.8, seed=config.train.seed),
                eos_id=self.tokenizer.eot_id,
            )
            samples.append({"prompt": prompt, "text": self.tokenizer.decode(new_ids)})
        return samples

    def record(self, step: int, timer: PhaseTimer, *, loss: float, lr: float, grad_norm: float) -> None:
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
            world_size=self.world_size,
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
        return tokens_per_s * flops_per_token(config.model, seq_len(config)) / (peak * self.world_size)

    def save(self, step: int, validation: dict[str, Any]) -> None:
        """Rank 0 writes the checkpoint; the others go on and wait for it in the next step's exchange."""
        if self.ledger is None:
            return
        config, start = self.plan.config, time.perf_counter()
        metadata = Metadata(
            run_id=str(config.run_id),
            step=step,
            tokens_seen=step * tokens_per_step(config),
            data_manifest_hash=self.train_rows.manifest.hash,
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

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values


class _LaneLoss(nn.Module):
    """The summed loss as a forward pass: what DistributedDataParallel wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets)
