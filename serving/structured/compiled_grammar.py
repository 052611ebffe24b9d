"""A compiled grammar, and the memory that it takes: what it has learned from an answer is shared
with all others, and grows."""

import sys
from collections.abc import Sequence
from typing import Any

from serving.structured.exact_numbers import Zone
from serving.structured.grammar_memory import GrammarMemory, heap_bytes
from serving.structured.number_mask import DigitTokens, NearNumbers, NumberMask

UNMEASURED_BYTES = 64 << 10  # that a mask is taken to need where the memory is not known
_PIECE_BYTES = 32  # that the C library adds to a piece of memory, at most


class CompiledGrammar:
    """A grammar at its start, of which each answer follows a copy."""

    def __init__(self, matcher: Any, *, zones: Sequence[Zone], digits: DigitTokens) -> None:
        """`matcher` is an `LLMatcher`."""
        self._matcher = matcher
        self._near = NearNumbers(zones) if zones else None
        self._digits = digits
        self._memory: GrammarMemory | None = None
        self.num_bytes = 0
        self.grown_bytes = 0  # of them, since it was compiled
        self.has_exceeded = False  # its bounds, with what it has learned

    def __del__(self) -> None:
        if self._memory is not None:
            self._memory.add(-self.num_bytes)

    def count_in(self, memory: GrammarMemory, num_bytes: int) -> None:
        """Counts it in an engine's memory, for as long as anything has it."""
        self._memory = memory
        self.num_bytes += num_bytes
        memory.add(num_bytes)

    def copy(self) -> Any:
        """Returns an `LLMatcher` for one answer."""
        return self._matcher.deep_copy()

    def number_mask(self) -> NumberMask | None:
        return None if self._near is None else NumberMask(self._near, self._digits)

    def bits_of(self, copy: Any) -> bytes | None:
        """Returns a bit for each token, and counts what the grammar has learned for it. None if it
        has exceeded its bounds, or the engine's memory."""
        if self._memory is not None and not self._memory.has_room_for(self.num_bytes):
            return None
        before = heap_bytes()
        bits: bytes = copy.compute_bitmask()
        after = heap_bytes()
        self._grow(
            UNMEASURED_BYTES
            if before is None or after is None
            else after - before - sys.getsizeof(bits) - _PIECE_BYTES
        )
        if copy.is_error():
            self.has_exceeded = True
            return None
        return bits

    def _grow(self, num_bytes: int) -> None:
        if num_bytes <= 0:
            return
        self.num_bytes += num_bytes
        self.grown_bytes += num_bytes
        if self._memory is not None:
            self._memory.add(num_bytes)
