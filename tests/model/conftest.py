"""Models small enough that an exact check of every number takes milliseconds."""

import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.autograd_ops import cross_entropy
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer, train_bpe


def small_model(seed: int = 0, **changes: Any) -> GPT:
    """Weights are spread wider than GPT-2's 0.02, so that attention and logits are far from uniform."""
    shape: dict[str, Any] = {"vocab_size": 97, "n_positions": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**(shape | {"initializer_range": 0.2} | changes)))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero biases would hide a bias that is never added
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def chunked_loss(model: GPT, token_ids: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Returns `model.loss` with chunks of another size."""
    rows = model.hidden(token_ids).flatten(0, 1)
    return cross_entropy(rows, model.head_weight, targets.flatten(), scale=1.0, chunk_tokens=chunk_tokens)


@pytest.fixture
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Over 1 MB of real text with some non-ASCII: sources of installed libraries."""
    sources = [
        *Path(pytest.__file__).parent.glob("*.py"),
        *Path(torch.__file__).parent.glob("nn/modules/*.py"),
        *Path(unittest.__file__).parent.glob("*.py"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in sorted(sources)]
    return [*texts, "Größe, naïveté, 東京, 🙂🙃, здравствуй, \u00a0\u3000 a\tb\r\n\x00"]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return train_bpe(corpus[:6], vocab_size=600)
