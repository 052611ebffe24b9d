"""The interface of the layers between token ids and the output head: `GPT` and the views of a query
know no more of it.

Shapes: B sequences, T tokens of each, C = n_embd, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from model.attention import Mask
from model.config import GPTConfig
from model.kv_cache import Window
from model.operations import PLAIN, Operations


class Block(nn.Module, ABC):
    """Attention and a feed-forward layer, each of which adds to the residual stream x (B, T, C)."""

    @abstractmethod
    def attended(self, x: Tensor, *values: Any, **more: Any) -> Tensor:
        """Returns x after attention. The values are the window of a KV cache, a mask, and
        `Body.for_blocks`."""

    @abstractmethod
    def fed_forward(self, x: Tensor) -> Tensor:
        """Returns x after the feed-forward layer."""


class Body(nn.Module, ABC):
    """All but the output head."""

    ops: Operations = PLAIN

    @abstractmethod
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()

    @property
    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """The embedding of tokens, with a weight (V, C)."""

    @property
    @abstractmethod
    def position_embedding(self) -> nn.Embedding | None:
        """The embedding of positions, with a weight (n_positions, C); None where queries and keys
        are turned."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """Each a `Block`, in order."""

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """The norm after the last block."""

    @abstractmethod
    def for_blocks(self, positions: Tensor) -> tuple[Any, ...]:
        """Returns what every block takes besides x, window and mask, for tokens at positions (B,
        T)."""

    @abstractmethod
    def forward(
        self, token_ids: Tensor, positions: Tensor, window: Window | None, mask: Mask
    ) -> Tensor:
        """Returns hidden states (B, T, C) after the last norm."""
