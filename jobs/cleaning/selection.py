"""Selects the documents that are kept and the split of each, in the driver, in canonical order and bounded memory.

The result does not depend on the number of workers or the order of their answers. The indexes and the records that are
compared across chunks lie in a local temporary folder: 40 bytes per document, about 1 kB with near-duplicates.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.settings.run import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning.document_index import DROP_CODES, INDEX, ChunkIndex
from jobs.cleaning.duplicates import Duplicates, Marks, NearDuplicates
from jobs.corpus.documents import Drop

Codes = npt.NDArray[np.uint8]  # (N,) of a chunk's documents: 0 trains, `HELD_OUT` validates, others are drop codes
HELD_OUT = 255
_NO_COUNTS = np.zeros(256, dtype=np.int64)


@dataclass(frozen=True)
class Summary:
    documents: int
    dropped: dict[str, int]  # by reason, with every reason
    source_hash: str  # of all texts in canonical order


class Selection:
    """`add` every chunk's index, in any order; then `decide`; then read `codes`."""

    def __init__(self, data: DataConfig, folder: Path, *, num_chunks: int) -> None:
        """`folder` is a temporary one on a local disk."""
        self._data, self._folder, self._num_chunks = data, folder, num_chunks
        self._duplicates: dict[Drop, Marks] = {}  # by reason, among the documents that nothing else drops
        self._starts = [0]  # the number of those before each chunk
        self._val_below = int(data.val_fraction * 2**64)

    def add(self, chunk: int, content: bytes) -> None:
        self._path(chunk).write_bytes(content)

    def decide(self) -> Summary:
        """Finds the duplicates, once all chunks are added; then counts."""
        self._find_duplicates()
        counts = self._counts()
        if self._num_chunks and self._data.val_fraction and 0 in (counts[0], counts[HELD_OUT]):
            # An exception for small corpora: at least one document trains and one validates.
            kept = np.concatenate([self._kept_hashes(chunk) for chunk in range(self._num_chunks)])
            if kept.size and kept.min() < kept.max():
                self._val_below = int(kept.max() if counts[HELD_OUT] else kept.min() + np.uint64(1))
                counts = self._counts()
        digests = "".join(self._index(chunk).digest.tobytes().hex() for chunk in range(self._num_chunks))
        return Summary(
            documents=int(counts[0] + counts[HELD_OUT]),
            dropped={str(reason): int(counts[code]) for code, reason in enumerate(DROP_CODES) if reason},
            source_hash=hashlib.sha256(digests.encode()).hexdigest(),
        )

    def codes(self, chunk: int) -> Codes:
        index = self._index(chunk)
        codes = index.drops.copy()
        candidates = np.flatnonzero(codes == 0)
        for reason, dropped in self._duplicates.items():
            found = candidates[dropped[self._starts[chunk] : self._starts[chunk + 1]]]
            codes[found[codes[found] == 0]] = DROP_CODES.index(reason)
        codes[(codes == 0) & (leading(index.hashes) < np.uint64(self._val_below))] = HELD_OUT
        return codes

    def store_codes(self, chunk: int, store: Storage) -> None:
        """Stores the codes, and the digest of the texts, for the tasks that read the chunk again."""
        store.write_bytes(_codes_key(chunk), self._index(chunk).digest.tobytes() + self.codes(chunk).tobytes())

    def _find_duplicates(self) -> None:
        threshold = self._data.near_dedup_threshold
        with Duplicates(self._folder) as exact, NearDuplicates(self._folder, threshold=threshold or 1.0) as near:
            for chunk in range(self._num_chunks):
                index = self._index(chunk)
                candidates = index.drops == 0
                self._starts.append(self._starts[-1] + int(candidates.sum()))
                if self._data.dedup:
                    exact.add(index.hashes[candidates])
                if threshold is not None:
                    near.add(index.signatures[candidates])
            if self._data.dedup:
                self._duplicates[Drop.DUPLICATE] = exact.find()
            if threshold is not None:
                self._duplicates[Drop.NEAR_DUPLICATE] = near.find()

    def _counts(self) -> npt.NDArray[np.int64]:
        """Returns the number of documents by code."""
        return sum((np.bincount(self.codes(chunk), minlength=256) for chunk in range(self._num_chunks)), _NO_COUNTS)

    def _kept_hashes(self, chunk: int) -> npt.NDArray[np.uint64]:
        return leading(self._index(chunk).hashes[np.isin(self.codes(chunk), (0, HELD_OUT))])

    def _index(self, chunk: int) -> ChunkIndex:
        return ChunkIndex.from_bytes(self._path(chunk).read_bytes())

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk:05d}"


def stored_codes(store: Storage, chunk: int) -> tuple[str, bytes]:
    """Returns the digest of a chunk's texts and its codes."""
    content = store.read_bytes(_codes_key(chunk))
    return content[:32].hex(), content[32:]


def _codes_key(chunk: int) -> str:
    return f"{INDEX}/{chunk:05d}.codes"


def leading(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Returns the first eight bytes of hashes (N, 16) as numbers. A document validates if its number is in the lowest
    share of all: it keeps its split when others come and go, and equal texts are in the same split."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
