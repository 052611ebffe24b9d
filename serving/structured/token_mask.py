"""Follows one answer through its grammar: which tokens may come next, and which one came.

Shapes: V vocabulary of the model, which may be larger than its tokenizer's.
"""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from serving.structured.compiled_grammar import CompiledGrammar


class TokenMask:
    """The state of one answer. It follows from the grammar and the answer's tokens alone, not from
    other answers in their steps."""

    def __init__(
        self, compiled: CompiledGrammar, *, stop_ids: Collection[int], vocab_size: int
    ) -> None:
        """The tokens of `stop_ids` end an answer where its grammar does; among them is the
        end-of-text token."""
        self._compiled = compiled
        self._matcher = compiled.copy()
        self._numbers = compiled.number_mask()
        self._stop_ids = list(stop_ids)
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_] | None:
        """Returns which tokens (V,) may come next, None if the grammar has exceeded its bounds or
        leaves none."""
        read = self._compiled.bits_of(self._matcher)
        if read is None:
            return None
        # With zeros for tokens that the tokenizer lacks
        bits = np.frombuffer(read, dtype=np.uint8)
        unpacked = np.unpackbits(bits, bitorder="little", count=self._vocab_size)
        allowed = unpacked.view(np.bool_)
        if self._numbers is not None:
            self._numbers.leave(allowed)
        if self._matcher.is_accepting():
            allowed[self._stop_ids] = True
        return allowed if allowed.any() else None

    @property
    def problem(self) -> str:
        """The bound of the grammar that is exceeded, if one is."""
        return str(self._matcher.get_error())

    def advance(self, token_id: int) -> None:
        """Records the token that was drawn, unless it ends the answer."""
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)
            if self._numbers is not None:
                self._numbers.advance(token_id)
