"""Chooses the windows of a text by which its spans are found again.

A window is eight tokens in a row. Of each five successive windows the one with the smallest hash is
chosen, the first one of equals. So two texts that share twelve tokens in a row choose a window
there in common, though each keeps only about a third of its windows (winnowing; Schleimer,
Wilkerson and Aiken, SIGMOD 2003).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.corpus.text_hashes import mix64

WINDOW_TOKENS = 8
GROUP_WINDOWS = 5
LEAST_SPAN = WINDOW_TOKENS + GROUP_WINDOWS - 1
"""Tokens of the shortest span that is surely found."""

Ids = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_MULTIPLIER = 0x9E3779B97F4A7C15


def plain_ids(tokens: npt.NDArray[Any]) -> Ids:
    """Returns the ids of tokens (N,) as a shard has them. Where the loss of a conversation does not
    count an id, the shard has ~id."""
    wide = tokens.astype(np.int64)
    return np.maximum(wide, ~wide).astype(np.uint64)


def chosen_windows(ids: Ids, *, border: int) -> tuple[Places, Ids]:
    """Returns the first tokens and the hashes of the windows that are chosen of ids (N,), in order.
    No group holds the token `border`, which ends a document."""
    if len(ids) < LEAST_SPAN:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    hashes = _hashes(ids)
    num_groups = len(hashes) - GROUP_WINDOWS + 1
    least = hashes[:num_groups].copy()
    places = np.arange(num_groups, dtype=np.int64)
    for offset in range(1, GROUP_WINDOWS):
        other = hashes[offset : offset + num_groups]
        is_less = other < least
        places[is_less] = np.flatnonzero(is_less) + offset
        np.minimum(least, other, out=least)
    borders_before = np.concatenate([[0], np.cumsum(ids == border)])
    is_whole = borders_before[LEAST_SPAN:] == borders_before[:-LEAST_SPAN]
    chosen = np.unique(places[is_whole])
    return chosen, hashes[chosen]


def _hashes(ids: Ids) -> Ids:
    """Returns the hash of each window: a polynomial of its ids, mixed."""
    num_windows = len(ids) - WINDOW_TOKENS + 1
    hashes = np.zeros(num_windows, np.uint64)
    for offset in range(WINDOW_TOKENS):
        hashes *= _MULTIPLIER
        hashes += ids[offset : offset + num_windows]
    return mix64(hashes)
