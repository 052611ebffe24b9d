"""Keeps an answer's whole numbers beyond 2^53 to the ones that its schema has, near which the
compiled grammar allows others (see `exact_numbers`).

It goes by the digits that stand in a row in the answer's text, wherever that is. So near a constant
no other number is written anywhere in the answer, which every schema allows.

Shapes: V vocabulary of the model.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.structured.exact_numbers import NUM_SHARED, Zone

_ROW, _LAST = re.compile(rb"[0-9]+"), re.compile(rb"[0-9]*\Z")
MAX_DIGITS = 64  # of a row that are kept; no zone has as many


class DigitTokens:
    """The digits that each token of a vocabulary adds to a row of digits."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        leading = [
            (found.end(), found.group().decode(), token_id)
            for token_id, token in enumerate(tokens)
            if (found := _ROW.match(token)) is not None
        ]
        self._leading = sorted(leading)
        self._lengths = [length for length, *_ in self._leading]
        # With so many digits in a row behind something else
        self.inner = [
            (token_id, found.group().decode())
            for token_id, token in enumerate(tokens)
            if len(token) > NUM_SHARED + 1
            for found in _ROW.finditer(token)
            if found.start() > 0 and len(found.group()) > NUM_SHARED
        ]

    def leading(self, *, at_least: int) -> list[tuple[int, str, int]]:
        """Returns length and digits of the tokens that begin with as many digits, and the
        tokens."""
        return self._leading[bisect_left(self._lengths, at_least) :]

    def after(self, row: str, token_id: int) -> str:
        """Returns the row of digits that a text ends with after one more token."""
        token = self._tokens[token_id] if token_id < len(self._tokens) else b""
        last = _LAST.search(token)
        assert last is not None
        digits = last.group().decode()
        return (row + digits if last.start() == 0 else digits)[:MAX_DIGITS]


class NearNumbers:
    """The numbers near a grammar's constants, of which its answers have the constants only."""

    def __init__(self, zones: Sequence[Zone]) -> None:
        """The zones rise, and share no more than their ends."""
        self._constants = sorted({str(one) for zone in zones for one in zone.allowed})
        self._ends: dict[int, tuple[list[int], list[int]]] = {}  # of zones, by numbers' length
        for zone in zones:
            lows, highs = self._ends.setdefault(len(str(zone.high)), ([], []))
            lows.append(zone.low)
            highs.append(zone.high)

    def may_begin(self, digits: str) -> bool:
        """Tells whether a number of a zone begins with these digits."""
        if digits.startswith("0"):
            return False
        for length, (lows, highs) in self._ends.items():
            if length >= len(digits):
                tail = 10 ** (length - len(digits))
                first = int(digits) * tail
                num_before = bisect_right(lows, first + tail - 1)
                if num_before and highs[num_before - 1] >= first:
                    return True
        return False

    def forbids(self, digits: str) -> bool:
        """Tells whether only numbers that are not constants begin with so many digits."""
        place = bisect_left(self._constants, digits)
        may_end_well = self._constants[place : place + 1]
        return self.may_begin(digits) and not (may_end_well and may_end_well[0].startswith(digits))


class NumberMask:
    """The numbers of one answer."""

    def __init__(self, near: NearNumbers, tokens: DigitTokens) -> None:
        self._near = near
        self._tokens = tokens
        self._row = ""  # of digits that the answer ends with

    def leave(self, allowed: NDArray[np.bool_]) -> None:
        """Removes, from the tokens (V,) that may come next, the tokens that lead to other
        numbers."""
        row = self._row
        if not row or self._near.may_begin(row):
            at_least = max(1, NUM_SHARED + 1 - len(row))
            for _, digits, token_id in self._tokens.leading(at_least=at_least):
                if allowed[token_id] and self._is_forbidden(row, row + digits):
                    allowed[token_id] = False
        for token_id, inner in self._tokens.inner:
            if allowed[token_id] and self._is_forbidden("", inner):
                allowed[token_id] = False

    def advance(self, token_id: int) -> None:
        self._row = self._tokens.after(self._row, token_id)

    def _is_forbidden(self, row: str, longer: str) -> bool:
        begins = range(max(len(row), NUM_SHARED) + 1, len(longer) + 1)
        return any(self._near.forbids(longer[:length]) for length in begins)
