"""GPT-2 and its training step in plain PyTorch, after nanoGPT: `bench_train` and `bench_loss` compare
with them.

B sequences, T tokens of each, C width. Linear layers, SDPA, the whole logits at once, fused AdamW,
clipping.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and targets (B, T)."""


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_embd: int


class SplitProjections(nn.Module):
    """Query, key and value as matrices of their own, which Muon orthogonalizes one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=2)


class Attention(nn.Module):
    def __init__(self, shape: Shape, *, is_fused: bool) -> None:
        super().__init__()
        self.n_head = shape.n_head
        width = shape.n_embd
        self.qkv = nn.Linear(width, 3 * width) if is_fused else SplitProjections(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, shape: Shape, *, is_fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.n_embd), nn.LayerNorm(shape.n_embd)
        self.attention = Attention(shape, is_fused=is_fused)
        self.up = nn.Linear(shape.n_embd, 4 * shape.n_embd)
        self.down = nn.Linear(4 * shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    def __init__(self, shape: Shape, *, is_fused: bool = True, is_tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.positions = nn.Embedding(shape.n_positions, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, is_fused=is_fused) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        if is_tied:
            self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy of targets (B, T)."""
        x = self.tokens(inputs) + self.positions(
            torch.arange(inputs.shape[1], device=inputs.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def training_step(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    is_bf16: bool,
    learning_rate: float = 6e-4,
) -> Callable[[Sequence[Batch]], float]:
    """Takes a step of nanoGPT's loop over micro-batches of one size: bf16 autocast or fp32,
    clipping at 1, fused AdamW. Returns the loss."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )

    def step(batches: Sequence[Batch]) -> float:
        total = 0.0
        for inputs, targets in batches:
            with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=is_bf16):
                loss = loss_of(inputs, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step
