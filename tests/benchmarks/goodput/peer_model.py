"""What the peers train: raymill's model, AdamW, rows that a sample's number gives, and the wait in place
of a larger model. Needs PyTorch and `model` alone, as torchft may live in an environment of its own.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import GPTConfig, preset_fields
from model.gpt import GPT

LEARNING_RATE = 1e-3


class Loss(nn.Module):
    """The mean loss as a forward pass, which DistributedDataParallel wraps. Waits for each row."""

    def __init__(self, model: GPT, *, row_s: float) -> None:
        super().__init__()
        self.model, self._row_s = model, row_s

    def forward(self, tokens: Tensor) -> Tensor:
        time.sleep(self._row_s * len(tokens))
        return self.model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()


def new_model(*, preset: str, vocab: int) -> GPT:
    """Returns a model with the same weights in each process."""
    config = replace(GPTConfig(**preset_fields({"preset": preset})), vocab_size=vocab)
    model = GPT(config)
    model.init_weights(0)
    return model


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def rows_of(samples: Iterable[int], *, vocab: int, seq_len: int) -> Tensor:
    """Returns the tokens (B, T + 1) of samples, by their numbers."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(1_000_003 + sample)
        rows.append(torch.randint(vocab, (seq_len + 1,), generator=generator))
    return torch.stack(rows)


def samples_of(step: int, *, batch: int, rank: int, world_size: int) -> Sequence[int]:
    """Returns the samples of a rank in a step, counted from 1: the batch is the same whatever the
    number of ranks."""
    return range((step - 1) * batch + rank, step * batch, world_size)


def hash_of(model: nn.Module) -> str:
    """Returns the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def save(state: dict[str, Any], file: Path) -> None:
    """Replaces the file by a whole one at once."""
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(state, part)
    part.replace(file)
