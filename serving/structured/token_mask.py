"""Follows one answer through its grammar: which tokens may come next, and which one came.

Shapes: V vocabulary of the model, which may be larger than its tokenizer's.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenMask:
    """The state of one answer. It follows from the grammar and the answer's tokens alone, whatever
    shares their steps."""

    def __init__(self, compiled: Any, *, stop_ids: Collection[int], vocab_size: int) -> None:
        """`compiled` is a grammar at its start, of which this is a copy. The tokens of `stop_ids`
        end an answer where its grammar does; among them is the end-of-text token."""
        self._matcher = compiled.deep_copy()
        self._stop_ids = list(stop_ids)
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_] | None:
        """Returns which tokens (V,) may come next, None if the grammar has exceeded its bounds or
        leaves none."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return None
        # With zeros for tokens that the tokenizer lacks
        unpacked = np.unpackbits(bits, bitorder="little", count=self._vocab_size)
        allowed = unpacked.view(np.bool_)
        if self._matcher.is_accepting():
            allowed[self._stop_ids] = True
        return allowed if allowed.any() else None

    def advance(self, token_id: int) -> None:
        """Records the token that was drawn, unless it ends the answer."""
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)
