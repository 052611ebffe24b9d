"""The interface of a decoder, from token ids to the loss: training and evaluation know no more of a
model.

Shapes: B sequences, T tokens of each, C = n_embd, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model.attention import Mask
from model.config import Shape
from model.kv_cache import Cache, ModuleCache
from model.operations import PLAIN, Operations
from model.shapes import hidden_matrices
from raymill.rules.hidden_matrix import HiddenMatrix


class Decoder(nn.Module, ABC):
    """A causal language model. Its weights are uninitialized memory until `init_weights` or
    `adopt`."""

    ops: Operations = PLAIN
    config: Shape

    rounds_matrices = True

    @property
    @abstractmethod
    def blocks(self) -> Iterable[Callable[..., Any]]:
        """The arguments of `ops.block`, in order."""

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        *,
        kv_cache: Cache | ModuleCache | None = None,
        positions: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Returns hidden states (B, T, C) after the final norm, from token_ids (B, T)."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V), at least fp32, from hidden (..., C)."""

    @abstractmethod
    def loss_of(self, hidden: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        """Returns `scale` times the loss of targets (B, T) from hidden (B, T, C), what `forward`
        returns."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Draws the weights."""

    @abstractmethod
    def new_cache(self, num_tokens: int) -> Cache | ModuleCache | None:
        """Returns a KV cache for one sequence of so many tokens; None for a model that computes a
        sequence from its first token each time."""

    @property
    def hidden_matrices(self) -> Mapping[str, HiddenMatrix]:
        return hidden_matrices(self.config)

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(weights), assign=True)

    def loss(
        self,
        token_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Returns `scale` times the summed cross-entropy (a scalar, at least fp32) of targets (B,
        T); IGNORE_INDEX is not counted."""
        hidden = self.forward(token_ids, positions=positions, mask=mask)
        return self.loss_of(hidden, targets, scale=scale)
