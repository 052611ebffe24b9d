"""What computes a step: the decoder on chunks of many sequences, with its KV cache in blocks.

Two of them: the CPU kernels of native_runner.py, and PyTorch for everything else (torch_runner.py).
Shapes: N tokens of all chunks, C model width, M rows, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.settings.serve import EngineConfig
from model.checkpoint_folder import is_hf_folder, read_metadata
from model.processor import fast_precision

# What a checkpoint is loaded in, by `engine.dtype`; the native kernels make int8 of it.
LOADED_IN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


class Reading(NamedTuple):
    """Tokens of one sequence that a step reads: ids, the position of the first, the sequence's blocks in order."""

    token_ids: list[int]
    position: int
    blocks: list[int]

    @property
    def positions(self) -> range:
        return range(self.position, self.position + len(self.token_ids))


class Survey(NamedTuple):
    """Of rows of logits."""

    best: Tensor  # (M,): the first of the highest ones
    finite: Tensor  # (M,): whether all of the row are finite numbers


class Runner(Protocol):
    def forward(self, readings: Sequence[Reading]) -> Tensor:
        """Hidden states (N, C), one reading after the other; their keys and values are in the cache then."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, V), fp32, of hidden states (M, C)."""

    def survey(self, logits: Tensor) -> Survey:
        """Of logits (M, V)."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Removes numbers that are none, which masked positions would still spread (0 x NaN is NaN)."""


def with_dtype(config: EngineConfig, folder: Path) -> EngineConfig:
    """Returns the settings with the type in the place of `auto`; where another one is set, as they are.

    A run in bf16 rounded its matrices to bf16 in each step, so that they may be served so where the processor computes
    bf16 at speed. All others are served in float32, which rounds nothing.
    """
    if config.dtype != "auto":
        return config
    trained = None if is_hf_folder(folder) else read_metadata(folder).precision
    is_rounded = trained == "bf16" and fast_precision(config.device) == "bf16"
    return config.model_copy(update={"dtype": "bfloat16" if is_rounded else "float32"})
