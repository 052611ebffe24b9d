"""A small model, and a tokenizer trained on real text."""

import unittest
from pathlib import Path

import pytest
import torch

from model.gpt import GPT
from model.text.tokenizer import Tokenizer, train_bpe
from tests.model.small_models import small_model


@pytest.fixture
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Over 1 MB of real text with some non-ASCII: the sources of installed libraries."""
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
