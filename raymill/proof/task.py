"""The training of every contender of the proof: a small network with dropout, on rows that are made."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raymill.rules.adamw import AdamW

RULE = AdamW(beta1=0.9, beta2=0.95, weight_decay=0.1)
LEARNING_RATE = 3e-3
_WIDTH, _NUM_BLOCKS, _NUM_CLASSES, _NUM_ROWS = 128, 2, 10, 8

Batch = tuple[Tensor, Tensor]
BatchOf = Callable[[int], Batch]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(_WIDTH),
            nn.Linear(_WIDTH, 2 * _WIDTH),
            nn.GELU(),
            nn.Linear(2 * _WIDTH, _WIDTH),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(_WIDTH, _WIDTH),
        *(Block() for _ in range(_NUM_BLOCKS)),
        nn.LayerNorm(_WIDTH),
        nn.Linear(_WIDTH, _NUM_CLASSES),
    )


def batch(step: int, lane: int) -> Batch:
    """Returns the rows (B, C) of a lane, and the class (B,) of each: where its largest value is,
    among the first few."""
    generator = torch.Generator().manual_seed(1000 * step + lane)
    rows = torch.randn(_NUM_ROWS, _WIDTH, generator=generator)
    return rows, rows[:, :_NUM_CLASSES].argmax(dim=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    rows, classes = batch
    return cross_entropy(model(rows), classes)


class Training(Protocol):
    """A training as one worker sees it; all workers call each method together."""

    @property
    def num_steps(self) -> int: ...

    def step(self, batch_of: BatchOf) -> float:
        """Takes a step on the batches of all lanes. Returns the loss, a mean over them."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def weights_hash(self) -> str: ...
