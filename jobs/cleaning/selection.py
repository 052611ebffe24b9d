"""Selects the documents that are kept and the split of each, in the driver, in canonical order and bounded memory.

The result does not depend on the number of workers or the order of their answers. The indexes and the records that are
compared across chunks lie in a local temporary folder: 40 bytes per document, about 1 kB with near-duplicates.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import numpy.typing as npt

from cluster.settings.run import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning.document_index import DROP_CODES, INDEX, ChunkIndex
from jobs.cleaning.duplicates import Duplicates, Marks, NearDuplicates
from jobs.corpus.documents import Drop

Codes = npt.NDArray[np.uint8]  # (N,) of a chunk's documents: 0 trains, `HELD_OUT` validates, others are drop codes
HELD_OUT = 255


@dataclass(frozen=True)
class Summary:
    documents: int
    held_out: int
    dropped: dict[str, int]  # by reason, with every reason
    source_hash: str  # of all texts in canonical order


class Selection:
    """`add` every chunk's index, in any order; then `decide`; then read `codes`."""

    def __init__(self, data: DataConfig, *, num_chunks: int) -> None:
        self._data = data
        self._num_chunks = num_chunks
        self._duplicates: dict[Drop, Marks] = {}  # by reason, among the documents that nothing else drops
        self._starts = [0]  # the number of those before each chunk
        self._exceptions: dict[tuple[int, int], int] = {}

    def __enter__(self) -> Self:
        self._scratch = TemporaryDirectory(prefix="raymill-selection-")
        return self

    def __exit__(self, *error: object) -> None:
        self._scratch.cleanup()

    def add(self, chunk: int, content: bytes) -> None:
        self._path(chunk).write_bytes(content)

    def decide(self) -> Summary:
        """Finds the duplicates, once all chunks are added; then counts."""
        self._find_duplicates()
        counts = np.zeros(256, dtype=np.int64)
        extremes: list[tuple[bytes, int, int]] = []
        digests = hashlib.sha256()
        for chunk in range(self._num_chunks):
            codes, index = self.codes(chunk), self._index(chunk)
            counts += np.bincount(codes, minlength=256)
            digests.update(index.digest.encode())
            if found := [*extremes, *self._kept(chunk, codes, index)]:
                extremes = [min(found), max(found)]
        if extremes and self._data.val_fraction and counts[0] + counts[HELD_OUT] >= 2:
            # An exception for small corpora: at least one document trains and one validates.
            if not counts[HELD_OUT]:
                self._move(extremes[0], HELD_OUT, counts)
            elif not counts[0]:
                self._move(extremes[-1], 0, counts)
        return Summary(
            documents=int(counts[0] + counts[HELD_OUT]),
            held_out=int(counts[HELD_OUT]),
            dropped={str(reason): int(counts[code]) for code, reason in enumerate(DROP_CODES) if reason},
            source_hash=digests.hexdigest(),
        )

    def codes(self, chunk: int) -> Codes:
        index = self._index(chunk)
        codes = index.drops.copy()
        candidates = np.flatnonzero(codes == 0)
        for reason, dropped in self._duplicates.items():
            found = candidates[dropped[self._starts[chunk] : self._starts[chunk + 1]]]
            codes[found[codes[found] == 0]] = DROP_CODES.index(reason)
        codes[(codes == 0) & held_out(index.hashes, self._data.val_fraction)] = HELD_OUT
        for (moved_chunk, document), code in self._exceptions.items():
            if moved_chunk == chunk:
                codes[document] = code
        return codes

    def store_codes(self, chunk: int, store: Storage) -> None:
        """Stores the codes, and the digest of the texts, for the tasks that read the chunk again."""
        digest = bytes.fromhex(self._index(chunk).digest)
        store.write_bytes(_codes_key(chunk), digest + self.codes(chunk).tobytes())

    def _find_duplicates(self) -> None:
        folder, threshold = Path(self._scratch.name), self._data.near_dedup_threshold
        with Duplicates(folder) as exact, NearDuplicates(folder, threshold=threshold or 1.0) as near:
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

    def _kept(self, chunk: int, codes: Codes, index: ChunkIndex) -> Iterator[tuple[bytes, int, int]]:
        """Yields (hash, chunk, document) of the kept documents with the smallest and the largest hash."""
        places = np.flatnonzero((codes == 0) | (codes == HELD_OUT))
        if len(places):
            order = np.lexsort(index.hashes[places].T[::-1])
            for place in (places[order[0]], places[order[-1]]):
                yield index.hashes[place].tobytes(), chunk, int(place)

    def _move(self, document: tuple[bytes, int, int], code: int, counts: npt.NDArray[np.int64]) -> None:
        self._exceptions[document[1:]] = code
        counts[code] += 1
        counts[HELD_OUT - code] -= 1

    def _index(self, chunk: int) -> ChunkIndex:
        return ChunkIndex.from_bytes(self._path(chunk).read_bytes())

    def _path(self, chunk: int) -> Path:
        return Path(self._scratch.name, f"{chunk:05d}")


def stored_codes(store: Storage, chunk: int) -> tuple[str, bytes]:
    """Returns the digest of a chunk's texts and its codes."""
    content = store.read_bytes(_codes_key(chunk))
    return content[:32].hex(), content[32:]


def _codes_key(chunk: int) -> str:
    return f"{INDEX}/{chunk:05d}.codes"


def held_out(hashes: npt.NDArray[np.uint8], val_fraction: float) -> npt.NDArray[np.bool_]:
    """Marks the validation documents among hashes (N, 16): those whose hash, as a number in [0, 1), is below the share.

    So a document keeps its split when others come and go, and equal texts are in the same split.
    """
    leading = np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1)
    chosen: npt.NDArray[np.bool_] = leading < np.uint64(int(val_fraction * 2**64))
    return chosen
