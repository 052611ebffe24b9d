"""Holds sequences back until their grammars are compiled, and leaves in rows of logits what a
grammar allows.

Shapes: M rows for which a token is drawn, V vocabulary.
"""

from collections.abc import Sequence as Many
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import torch
from torch import Tensor

from serving.engine.messages import SequenceRequest
from serving.engine.scheduler import Sequence
from serving.structured.grammar_cache import GrammarCache
from serving.structured.token_mask import TokenMask

LONGEST_WAIT_S = 0.005  # of a step without other work; then new commands are read


class GrammarRows:
    """The grammars of an engine's sequences."""

    def __init__(self, cache: GrammarCache) -> None:
        self._cache = cache
        self._waiting: dict[int, tuple[SequenceRequest, Future[Any]]] = {}

    def __len__(self) -> int:
        """Returns how many sequences wait for their grammars."""
        return len(self._waiting)

    def hold(self, request: SequenceRequest) -> None:
        assert request.grammar is not None
        self._waiting[request.seq_id] = request, self._cache.get(request.grammar)

    def cancel(self, seq_id: int) -> None:
        self._waiting.pop(seq_id, None)

    def take_back(self) -> list[SequenceRequest]:
        """Removes and returns the sequences that wait."""
        requests = [request for request, _ in self._waiting.values()]
        self._waiting.clear()
        return requests

    def wait(self) -> None:
        """Waits a moment for a grammar that is being compiled."""
        futures = [future for _, future in self._waiting.values()]
        wait(futures, timeout=LONGEST_WAIT_S, return_when=FIRST_COMPLETED)

    def take_ready(self) -> list[tuple[SequenceRequest, Any]]:
        """Removes and returns the sequences whose grammar is compiled, with it, or with None if it
        could not be."""
        ready = []
        for request, future in [*self._waiting.values()]:
            if future.done():
                del self._waiting[request.seq_id]
                grammar = future.result() if future.exception() is None else None
                ready.append((request, grammar))
        return ready


def masked(sequences: Many[Sequence], logits: Tensor, best: Tensor) -> list[bool]:
    """Puts -inf into logits (M, V) where a row's grammar allows no token, and the best of the
    others into `best` (M,). Returns which rows have a token left. A grammar says when its answer
    ends, so that none may be kept from its end."""
    has_token = [True] * len(sequences)
    for row, sequence in enumerate(sequences):
        if sequence.compiled_grammar is None:
            continue
        if sequence.mask is None:
            sequence.mask = TokenMask(
                sequence.compiled_grammar,
                stop_ids=sequence.stop_ids,
                vocab_size=logits.shape[-1],
            )
        allowed = sequence.mask.allowed()
        has_token[row] = allowed is not None and not sequence.forbidden_ids
        if allowed is not None:
            logits[row].masked_fill_(torch.from_numpy(~allowed), -torch.inf)
            if not allowed[best[row]]:
                best[row] = logits[row].argmax()
    return has_token
