"""Which documents of a corpus repeat the text of an earlier one, found on a local disk in bounded memory."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from jobs.spool import DocumentSearch, Numbers, Records

_RECORD = np.dtype([("high", "u8"), ("low", "u8"), ("place", "u8")])  # halves of the hash; where the document is
_NUM_BUCKETS = 256  # a bucket of 10^9 documents takes 94 MB


class Duplicates(DocumentSearch):
    """Drops all but the first, in canonical order (chunk, then document), of equal hashes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _RECORD, num_buckets=_NUM_BUCKETS)

    def add(self, chunk: int, documents: Numbers, hashes: npt.NDArray[np.uint8]) -> None:
        """Numbers (D,) of a chunk's documents, ascending, and their hashes (D, 16)."""
        records = np.empty(len(hashes), dtype=_RECORD)
        records["high"], records["low"] = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2).T
        records["place"] = self._enter(chunk, documents)
        self._spool.add(hashes[:, 0].astype(np.uint16), records)

    def _search(self, records: Records, dropped: npt.NDArray[np.bool_]) -> None:
        records = records[np.lexsort((records["place"], records["low"], records["high"]))]
        later, former = records[1:], records[:-1]
        repeats = (later["high"] == former["high"]) & (later["low"] == former["low"])
        dropped[self._rows(later["place"][repeats])] = True
