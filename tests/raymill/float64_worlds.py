"""Trains twenty small modules by the exact engine, over real gloo processes, and by a plain loop in
float64, and prints how far they end from each other.

    python -m tests.raymill.float64_worlds WORLD_SIZE FOLDER

Prints one JSON object: by module and way to shard, the largest difference of a weight over the
largest change that training made to one, and the SHA-256 of the weights.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymill import ExactEngine
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.update_rule import Stretch, Unit
from raymill.state.shard import Shard

NUM_STEPS, NUM_LANES = 3, 7
RATE, MOMENTUM = 0.1, 0.9
SHARDS: tuple[Shard, ...] = ("none", "optimizer", "gradients")
B, T, C = 3, 6, 8  # of a batch


@dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum, which hides no rounding as AdamW's quotient would."""

    unit: ClassVar[Unit] = Unit.VALUE
    vectors: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    matrix_vectors: ClassVar[tuple[str, ...]] = ()

    def update(self, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        for stretch in stretches:
            [average] = stretch.vectors
            average.mul_(MOMENTUM).add_(stretch.gradient)
            stretch.values.add_(average, alpha=-learning_rate)
            stretch.count.add_(1)

    def flops(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        return 0.0

    def bytes_moved(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        return 0.0


class First(nn.Module):
    """Takes the first of what a module returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(C, C, C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bilinear(x, x.flip(1))
        return y


class Tied(nn.Module):
    """Uses one matrix twice, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.scale = nn.Parameter(torch.randn(C, C) / C), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(x @ self.matrix) @ self.matrix.T * self.scale
        return y


class Looked(nn.Module):
    """Looks up rows of a table, some of them more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table((x[..., 0] * 2).long().clamp(0, 4))
        return y


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _images(*layers: nn.Module) -> nn.Module:
    """Over batches as images (B, 1, T, C)."""
    return nn.Sequential(nn.Unflatten(1, (1, T)), *layers)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(C, 5),
    "perceptron": lambda: nn.Sequential(nn.Linear(C, 40), nn.ReLU(), nn.Linear(40, 3)),
    "wide": lambda: nn.Sequential(nn.Linear(C, 700), nn.GELU(), nn.Linear(700, C)),
    "gated": lambda: nn.Sequential(nn.Linear(C, 64), nn.GLU(), nn.Linear(32, C)),
    "residual": lambda: nn.Sequential(*(Residual(nn.Linear(C, C)) for _ in range(3))),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C)),
    "RMS norm": lambda: nn.Sequential(nn.RMSNorm(C), nn.Linear(C, C)),
    "group norm": lambda: nn.Sequential(nn.Conv1d(T, 4, 3), nn.GroupNorm(2, 4)),
    "convolution": lambda: _images(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)),
    "strides": lambda: _images(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.SiLU()),
    "transposed": lambda: _images(nn.ConvTranspose2d(1, 3, 2, stride=2)),
    "three axes": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, T // 2)), nn.Conv3d(1, 3, 2)),
    "pooled": lambda: _images(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
    "LSTM": lambda: First(nn.LSTM(C, 12, batch_first=True)),
    "GRU": lambda: First(nn.GRU(C, 10, num_layers=2, batch_first=True)),
    "attention": Attention,
    "transformer": lambda: nn.TransformerEncoderLayer(C, 2, 32, dropout=0.0, batch_first=True),
    "bilinear": Products,
    "tied": Tied,
    "table": Looked,
}


def batch_of(step: int, lane: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    return torch.randn(B, T, C, generator=generator)


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    y: Tensor = module(batch)
    return (y - 0.5).square().mean()


def plain(make: Callable[[], nn.Module]) -> tuple[list[Tensor], float]:
    """Returns the weights after training in float64 by torch's own optimizer, and the largest
    change of one."""
    torch.manual_seed(0)
    module = make().double()
    first = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        losses = [loss(module, batch_of(step, lane).double()) for lane in range(NUM_LANES)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    last = [parameter.detach() for parameter in module.parameters()]
    change = max(
        float((after - before).abs().max()) for before, after in zip(first, last, strict=True)
    )
    return last, change


def trained(make: Callable[[], nn.Module], shard: Shard) -> tuple[list[Tensor], str]:
    torch.manual_seed(0)
    module = make()
    engine = ExactEngine(module, loss, num_lanes=NUM_LANES, rule=Momentum(), shard=shard)
    while (step := engine.num_steps) < NUM_STEPS:
        engine.step(lambda lane, step=step: batch_of(step, lane), learning_rate=RATE)
    engine.close()
    return [parameter.detach() for parameter in module.parameters()], engine.weights_hash()


def run_rank(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found: dict[str, dict[str, Any]] = {}
    for name, make in MODULES.items():
        expected, change = plain(make) if rank == 0 else ([], 1.0)
        found[name] = {}
        for shard in SHARDS:
            weights, digest = trained(make, shard)
            distances = [
                float((ours - theirs).abs().max())
                for ours, theirs in zip(weights, expected, strict=bool(expected))
            ]
            error = max(distances, default=0.0) / change
            found[name][shard] = {"error": error, "change": change, "hash": digest}
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    size, path = int(sys.argv[1]), Path(sys.argv[2])
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(size) as pool:
        results = pool.starmap(run_rank, [(rank, size, path) for rank in range(size)], chunksize=1)
    print(json.dumps(results[0]))
