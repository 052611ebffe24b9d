"""The training steps that `bench_train` compares: raymill's own, Hugging Face's GPT-2 and a plain
loop.

The two peers come as they are and with their forward pass, loss and backward pass under
torch.compile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from model.config import PRESETS
from model.gpt import GPT
from model.hardware.memory import keep_freed_memory
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup
from tests.benchmarks.plain_gpt2 import PlainGPT2, Shape, training_step

NUM_BATCHES = 8

Step = Callable[[int], float]
"""Trains on the batch of this number; returns the loss."""


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    preset: str
    batch_size: int
    seq_len: int
    precision: str  # fp32 or bf16

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def label(self) -> str:
        return f"{self.preset}_{self.precision}"

    @property
    def num_flops(self) -> int:
        """The operations of a step."""
        return self.num_tokens * self.config().model.flops_per_token(self.seq_len)

    def config(self, compute: str = "cpu") -> RunConfig:
        train = {
            "compute": compute,
            "global_batch_size": self.batch_size,
            "micro_batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "max_tokens": 10_000 * self.num_tokens,
            "precision": self.precision,
        }
        scaling = {"max_workers": 1}
        return RunConfig.model_validate(
            {"model": {"preset": self.preset}, "train": train, "scaling": scaling}
        )

    def batches(self) -> Tensor:
        """Returns tokens (NUM_BATCHES, B, T + 1), the same for every contender."""
        vocab_size = self.config().model.vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            vocab_size, (NUM_BATCHES, self.batch_size, self.seq_len + 1), generator=generator
        )


class RowsInMemory:
    """Rows in memory, as the other contenders have them."""

    def __init__(self, batches: Tensor) -> None:
        """`batches` has tokens (number, B, T + 1)."""
        self._rows = batches.flatten(0, 1)

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = self._rows[torch.as_tensor(indices) % len(self._rows)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def read_ahead(self, indices: Any) -> None:
        pass


@contextmanager
def exactly() -> Iterator[None]:
    """Sets up this process as a raymill worker; no contender is obliged to do the same."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def raymill(cell: Cell, compute: str = "cpu") -> Step:
    """Steps with the parts and the settings of `jobs/training/train_loop.py`."""
    keep_freed_memory()  # for the whole process: its peers gain by it as well
    config, group = cell.config(compute), WorkerGroup(rank=0, world_size=1)
    model = GPT(config.model)
    model.init_weights(0)
    state = run_state(model.train(), config.train, device=torch.device("cpu"), group=group)
    rows: Any = RowsInMemory(cell.batches())
    gradient, timer = step_gradient(config, state, rows, group, eot_id=None), StepTimer()

    def step(number: int) -> float:
        with exactly():
            measured = gradient.of_step(number + 1, timer)
            with timer.phase("update"):
                state.apply(norm=measured.norm, learning_rate=6e-4)
        timer.take()
        return measured.loss

    return step


def plain(cell: Cell, *, is_compiled: bool) -> Step:
    model = PlainGPT2(Shape(**_shape(cell)))
    return _step(cell, model, model, is_compiled=is_compiled)


def hugging_face(cell: Cell, *, is_compiled: bool) -> Step:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(
        GPT2Config(**_shape(cell), **dropout, use_cache=False, attn_implementation="sdpa")
    )

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _step(cell, model, loss_of, is_compiled=is_compiled)


def _shape(cell: Cell) -> dict[str, int]:
    return {"vocab_size": 50257, "n_positions": 1024} | PRESETS[cell.preset]


def _step(
    cell: Cell, model: nn.Module, loss_of: Callable[..., Tensor], *, is_compiled: bool
) -> Step:
    loss_of = torch.compile(loss_of, dynamic=False) if is_compiled else loss_of
    step = training_step(model, loss_of, is_bf16=cell.precision == "bf16")
    pairs = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in cell.batches()]
    return lambda number: step([pairs[number % len(pairs)]])


PEERS: dict[str, Callable[[Cell], Step]] = {
    "Hugging Face": partial(hugging_face, is_compiled=False),
    "plain": partial(plain, is_compiled=False),
}
COMPILED_PEERS: dict[str, Callable[[Cell], Step]] = {
    "Hugging Face compiled": partial(hugging_face, is_compiled=True),
    "plain compiled": partial(plain, is_compiled=True),
}


def why_not_compiled() -> str | None:
    """Returns what torch.compile lacks on this machine, such as a C++ compiler, or None where it
    works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None
