"""Small training states, real gradients for them, and their moments as a checkpoint has them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.settings.train import TrainConfig
from jobs.exact.run_state import run_state
from jobs.exact.stored_state import vectors_by_name
from model.config import GPTConfig, preset_fields
from model.gpt import GPT
from raymill.files.safetensors_file import safetensors_pieces
from raymill.files.stored_tensors import StoredTensors
from raymill.state.span import Span
from raymill.state.state_shares import StatePiece, StateShares
from raymill.state.train_state import TrainState
from raymill.sums.step_totals import block_square_sums, norm_of

RATE = 1e-2


def make_model(**changes: Any) -> GPT:
    # Odd sizes, so that no parameter but by padding ends at a multiple of 16 values.
    shape = {"preset": "tiny", "n_embd": 18, "n_inner": 31, "n_positions": 9, "vocab_size": 301}
    model = GPT(GPTConfig(**preset_fields(shape | changes)))
    model.init_weights(0)
    return model


def make_state(model: GPT | None = None, **settings: Any) -> TrainState:
    config = TrainConfig(
        **({"precision": "fp32", "weight_decay": 0.3, "grad_clip": 0.0} | settings)
    )
    return run_state(model or make_model(), config, device=torch.device("cpu"))


def gradients(state: TrainState, count: int, *, scale: float = 1.0) -> Iterator[Tensor]:
    """Real gradients (P,) of random batches: each is left in the buffer, and copied."""
    for seed in range(count):
        tokens = torch.randint(0, 301, (3, 10), generator=torch.Generator().manual_seed(seed))
        state.gradient.zero_()
        (state.model.loss(tokens[:, :-1], tokens[:, 1:]) * scale).backward()
        yield state.gradient.clone()


def apply(state: TrainState, gradient: Tensor, *, learning_rate: float) -> float:
    """Returns the gradient's norm."""
    state.gradient.copy_(gradient)
    norm = norm_of(block_square_sums(state.gradient))
    state.apply(norm=norm, learning_rate=learning_rate)
    return norm


def whole(state: TrainState) -> dict[str, Tensor]:
    """Returns a copy of the flat values and moments of a state that is not sharded."""
    return {name: part.clone() for name, part in state.parts.items()}


def moments(state: TrainState) -> dict[str, Tensor]:
    """Returns a copy of the optimizer's state by parameter, which is not sharded."""
    return vectors_by_name(state, whole(state))


def pieces_of(state: TrainState, rank: int, *, world_size: int) -> Iterator[StatePiece]:
    """Yields a rank's share of the state, in pieces that end anywhere."""
    for name, views in StateShares(state).views(rank, world_size=world_size).items():
        spans = StateShares(state).spans(name, rank, world_size=world_size)
        values = torch.cat([torch.empty(0), *views])
        for start in range(0, len(values), 7777):
            span = Span(start, min(start + 7777, len(values)))
            yield StatePiece(name, spans.cut(span), span.of(values).clone())


def stored(*files: Mapping[str, Tensor]) -> StoredTensors:
    """Returns tensors as safetensors files have them."""
    contents = {
        f"file {n}": b"".join(safetensors_pieces(tensors)) for n, tensors in enumerate(files)
    }
    return StoredTensors(
        contents, lambda file, start, end: contents[file][start:end], source="memory"
    )
