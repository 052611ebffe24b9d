"""Small runs for any device: their settings, rows that are a function of their number, and a step
as training takes it.

It imports neither Ray nor a client of any storage, as what it is used by must run where only
PyTorch is installed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.settings.run import RunConfig, seq_len
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.training.mixed_hardware import settle_rounding
from model.gpt import GPT
from raymill.state.shard import Shard
from raymill.step_timer import CudaClock, StepTimer
from raymill.sums.step_totals import Measured
from raymill.workers.worker_group import WorkerGroup

EOT_ID = 0

# (tokens of a row, width, heads, layers, sequences of a lane): what a CPU computes in milliseconds,
# and shapes for which a GPU takes the kernels of a real run.
_SIZES = {"cpu": (24, 24, 2, 2, 2), "cuda": (256, 256, 4, 4, 4)}


def made_config(
    device: torch.device,
    *,
    num_lanes: int = 4,
    model: dict[str, Any] | None = None,
    shard: Shard = "none",
    **train: Any,
) -> RunConfig:
    """Returns the settings of a run on the device, with changes of the model and of `train`."""
    length, width, heads, layers, size = _SIZES[device.type]
    shape = {
        "vocab_size": 101,
        "n_positions": length,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
    }
    settings = {
        "global_batch_size": num_lanes * size,
        "micro_batch_size": size,
        "max_tokens": 1000 * num_lanes * size * length,
        "precision": "fp32",
    }
    return RunConfig.model_validate(
        {
            # Wide enough that attention is far from uniform, so that a wrong score changes the
            # loss.
            "model": shape | {"initializer_range": 0.1} | (model or {}),
            "train": settings | train,
            "scaling": {"max_workers": 1, "use_gpu": device.type == "cuda", "shard": shard},
        }
    )


@dataclasses.dataclass(frozen=True)
class MadeRows:
    """Rows that are a function of their number: a document ends after every tenth token or so."""

    seq_len: int
    vocab_size: int

    @classmethod
    def of(cls, config: RunConfig) -> "MadeRows":
        return cls(seq_len(config), config.model.vocab_size)

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = np.stack(
            [
                np.random.default_rng(int(n)).integers(self.vocab_size, size=self.seq_len + 1)
                for n in indices
            ]
        )
        rows[rows % 10 == 0] = EOT_ID
        batch = torch.from_numpy(rows)  # (B, T + 1)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    rows = samples

    def read_ahead(self, indices: Any) -> None:
        pass

    def count_rows(self, *, at_most: float) -> int:
        return int(min(10, at_most))

    def bytes_per_token(self, num_rows: int) -> float:
        return 4.0


class MadeRun:
    """One rank's part of a run on a device."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        group: WorkerGroup | None = None,
        *,
        draw: Callable[[GPT], None] | None = None,
    ) -> None:
        """`draw` sets the weights on the device; without it they are those of a real run, drawn on
        the host."""
        self.config, self.device, self.group = config, device, group or WorkerGroup(0, 1)
        self.rows = MadeRows.of(config)
        self.eot_id = EOT_ID if config.train.document_mask else None
        with device if draw else nullcontext():
            model = GPT(config.model)
        draw(model) if draw else model.init_weights(config.train.seed)
        sharding = run_sharding(
            config.scaling, rank=self.group.rank, world_size=self.group.world_size
        )
        self.state = run_state(
            model.train(), config.train, device=device, group=self.group, sharding=sharding
        )
        rows: Any = self.rows
        with as_in_training(config):
            self.gradient = step_gradient(config, self.state, rows, self.group, eot_id=self.eot_id)
        self.timer = StepTimer(CudaClock() if device.type == "cuda" else None)

    def gradient_of(self, step: int) -> Measured:
        with as_in_training(self.config):
            return self.gradient.of_step(step, self.timer)

    def step(self, number: int, *, learning_rate: float = 1e-2) -> float:
        """Returns the loss before the update."""
        measured = self.gradient_of(number)
        with as_in_training(self.config):
            self.state.apply(norm=measured.norm, learning_rate=learning_rate, timer=self.timer)
        self.timer.take()
        return measured.loss

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs and targets (lanes x B, T) of a whole step."""
        size = self.config.train.global_batch_size
        inputs, targets = self.rows.samples(range((step - 1) * size, step * size))
        return inputs.to(self.device), targets.to(self.device)

    def close(self) -> None:
        self.gradient.close()


@contextmanager
def as_in_training(config: RunConfig) -> Iterator[None]:
    """Lasts while PyTorch rounds as in training: in exact mode an operation without fixed order
    raises."""
    settle_rounding(config)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.utils.deterministic.fill_uninitialized_memory = True
