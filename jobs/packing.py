"""Which documents are kept, in which split, and in which shard: pure functions of the corpus's index.

Nothing here knows how many workers read or write, so the shards are the same for any number of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.corpus_index import DROP_CODES, CorpusIndex
from jobs.documents import Drop
from jobs.token_store import Split

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardPlan:
    """One shard and its documents (K,), a slice of the index."""

    file: str
    split: Split
    documents: CorpusIndex


def drop_duplicates(index: CorpusIndex) -> CorpusIndex:
    """The index with all but the first of equal texts dropped."""
    kept = np.flatnonzero(index["drop"] == 0)
    _, first = np.unique(_as_strings(index["hash"][kept]), return_index=True)
    result = index.copy()
    result["drop"][kept] = DROP_CODES.index(Drop.DUPLICATE)
    result["drop"][kept[first]] = 0
    return result


def plan_shards(index: CorpusIndex, *, val_fraction: float, shard_bytes: int) -> list[ShardPlan]:
    """The kept documents as shards; a shard ends with the document that reaches `shard_bytes` of text."""
    kept = index[index["drop"] == 0]
    held_out = validation_mask(kept["hash"], val_fraction)
    return [
        *_cut(kept[~held_out], split="train", shard_bytes=shard_bytes),
        *_cut(kept[held_out], split="val", shard_bytes=shard_bytes),
    ]


def validation_mask(hashes: npt.NDArray[np.uint8], val_fraction: float) -> Mask:
    """Which kept documents (K, 32) are held out: those whose hash, as a number in [0, 1), is below the share.

    So a document keeps its split when others come and go. One exception serves small corpora: of two documents or
    more, at least one trains and (with a share above 0) one validates, chosen by largest and by smallest hash.
    """
    leading = np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1)
    held_out: Mask = leading < np.uint64(int(val_fraction * 2**64))
    if val_fraction and len(hashes):
        order = np.argsort(_as_strings(hashes), kind="stable")
        held_out[order[0]] |= not held_out.any()
        held_out[order[-1]] &= not held_out.all()
    return held_out


def count_drops(index: CorpusIndex) -> dict[str, int]:
    """Documents by reason, every reason named."""
    counts = np.bincount(index["drop"], minlength=len(DROP_CODES)).tolist()
    return {str(reason): count for reason, count in zip(DROP_CODES, counts, strict=True) if reason}


def _cut(documents: CorpusIndex, *, split: Split, shard_bytes: int) -> list[ShardPlan]:
    starts = np.cumsum(documents["size"]) - documents["size"]
    firsts = np.flatnonzero(np.diff(starts // shard_bytes, prepend=-1))
    prefix = "shard" if split == "train" else split
    return [
        ShardPlan(f"{prefix}-{number:05d}.bin", split, part)
        for number, part in enumerate(np.split(documents, firsts)[1:])
    ]


def _as_strings(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """(K, 32) as K strings, which NumPy sorts and compares as a whole."""
    return np.ascontiguousarray(hashes).view("S32").reshape(-1)
