"""Leaves of an answer's whole numbers beyond 2^53 those that its schema has, near which the
compiled grammar allows others (see `exact_numbers`).

It goes by the digits that stand in a row in the answer's text, wherever that is. So near a constant
no other number is written anywhere in the answer, which every schema allows.

Shapes: V vocabulary of the model.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.structured.exact_numbers import NUM_SHARED, Zone

_ROW, _LAST = re.compile(rb"[0-9]+"), re.compile(rb"[0-9]*\Z")
MAX_DIGITS = 64  # of a row that are kept; no zone has as many


class DigitTokens:
    """What the tokens of a vocabulary add to a row of digits."""

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


class NumberMask:
    """The numbers of one answer."""

    def __init__(self, zones: Sequence[Zone], tokens: DigitTokens) -> None:
        self._zones = zones
        self._tokens = tokens
        self._row = ""  # of digits that the answer ends with

    def leave(self, allowed: NDArray[np.bool_]) -> None:
        """Removes from the tokens (V,) that may come next those that lead to other numbers."""
        row = self._row
        zones = [zone for zone in self._zones if not row or zone.may_begin(row)]
        for _, digits, token_id in self._tokens.leading(at_least=max(1, NUM_SHARED + 1 - len(row))):
            if allowed[token_id] and _is_forbidden(row, row + digits, zones):
                allowed[token_id] = False
        for token_id, inner in self._tokens.inner:
            if allowed[token_id] and _is_forbidden("", inner, self._zones):
                allowed[token_id] = False

    def advance(self, token_id: int) -> None:
        self._row = self._tokens.after(self._row, token_id)


def _is_forbidden(row: str, longer: str, zones: Sequence[Zone]) -> bool:
    begins = range(max(len(row), NUM_SHARED) + 1, len(longer) + 1)
    return any(zone.forbids(longer[:length]) for length in begins for zone in zones)
