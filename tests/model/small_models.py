"""Models small enough that an exact check of every number takes milliseconds, and their loss in
small chunks."""

from typing import Any

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT


def small_model(seed: int = 0, **changes: Any) -> GPT:
    """Returns a model whose weights spread wider than GPT-2's 0.02, so that attention and logits
    are far from uniform."""
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "n_positions": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
    }
    model = GPT(GPTConfig(**(shape | {"initializer_range": 0.2} | changes)))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero biases would hide a bias that is never added
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def chunked_loss(model: GPT, token_ids: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Returns `model.loss` with chunks of another size."""
    rows = model(token_ids).flatten(0, 1)
    return model.ops.cross_entropy(
        rows, model.head_weight, targets.flatten(), scale=1.0, chunk_tokens=chunk_tokens
    )
