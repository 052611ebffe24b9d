"""The interface of a runner, which computes a step: the decoder on chunks of many sequences, with
its KV cache in blocks; and the type in which it computes.

There are two: the native kernels (native_runner.py), which are portable, and PyTorch where they are
missing (torch_runner.py). Shapes: N tokens of all chunks, C model width, M rows, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.settings.serve import EngineConfig
from model.files.checkpoint_folder import StoredModel
from model.hardware.processor import fast_precision
from model.numerics import FP32, NUMERICS

# The type in which a checkpoint is loaded, by `engine.dtype`; the native kernels turn it into int8.
LOADED_IN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


def with_dtype(config: EngineConfig, folder: Path) -> EngineConfig:
    """Returns the settings with a type instead of `auto`.

    A run in bf16 rounded its matrices to bf16 in each step, so bf16 serves it without loss where
    the processor computes bf16 at speed. All others are served in float32, which rounds nothing,
    except on a GPU: it has fast attention for bf16 alone.
    """
    if config.dtype != "auto":
        return config
    metadata = StoredModel(folder).metadata
    trained = metadata and metadata.precision
    fast = NUMERICS[fast_precision(config.device)]
    loses_nothing = trained == fast.name or config.device == "cuda"
    return config.model_copy(update={"dtype": (fast if loses_nothing else FP32).torch_type})


class Reading(NamedTuple):
    """The tokens of one sequence that a step reads, the position of the first, and the sequence's
    blocks in order."""

    token_ids: list[int]
    position: int
    blocks: list[int]

    @property
    def positions(self) -> range:
        return range(self.position, self.position + len(self.token_ids))


class Survey(NamedTuple):
    """Facts about rows of logits."""

    best: Tensor  # (M,): the index of the first of the highest logits
    finite: Tensor  # (M,): whether the whole row is finite


class Runner(Protocol):
    is_portable: bool
    """Whether everything that it computes has the same bits on every processor."""

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        """Returns hidden states (N, C), one reading after the other, and stores their keys and
        values in the cache."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits (M, V) of hidden states (M, C)."""

    def survey(self, logits: Tensor) -> Survey:
        """Surveys logits (M, V)."""

    def exponentials(self, numbers: Tensor) -> Tensor:
        """Replaces fp32 numbers (M, V) by their exponentials, and returns them."""

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Returns the logarithms (M, V) of the softmax of logits (M, V)."""
