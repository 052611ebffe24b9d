"""Selects the documents that are kept and the split of each, in tasks of bounded memory.

The result does not depend on the number of workers or the order of their answers. The driver holds
some bytes for each chunk and 2 kB for each of 1,024 sections at most.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning.deduplication import Decisions, Deduplication
from jobs.cleaning.document_index import INDEX, section_indexes, selection_folder
from jobs.cleaning.exchange import Runner, Section, step_results
from jobs.cleaning.why_dropped import DROP_CODES
from jobs.corpus.documents import Drop
from jobs.corpus.ray_data_tasks import run_tasks

HELD_OUT = 255  # the code of a document that validates; 0 trains, and the others are drop codes
_NO_HASH = 2**64 - 1
_SETTLED = np.dtype([("counts", "<u8", 256), ("least", "<u8"), ("most", "<u8")])


@dataclass(frozen=True)
class Summary:
    documents: int
    dropped: dict[str, int]  # by reason, with every reason
    source_hash: str  # of all texts in canonical order


def select(
    store: Storage,
    indexed: Sequence[tuple[bytes, int]],
    data: DataConfig,
    *,
    run: Runner = run_tasks,
) -> Summary:
    """Stores the codes of all documents, whose chunks are `indexed` as `index_corpus` says. Needs
    Ray."""
    sizes = [num_documents for _, num_documents in indexed]
    search = Deduplication(store, sizes, data, run=run)
    decisions: list[Decisions] = []
    if indexed and data.dedup:
        decisions.append(search.exact())
    if indexed and data.near_dedup_threshold is not None:
        decisions.append(search.near(*decisions))

    def settled(val_below: int) -> npt.NDArray[np.void]:
        key = f"{selection_folder(data)}/settled-{val_below:x}"
        work = partial(settle, store=store, key=key, decisions=decisions, val_below=val_below)
        contents = step_results("storing decisions", search.sections, work, run=run)
        return np.frombuffer(b"".join(contents), _SETTLED)

    val_below = int(data.val_fraction * 2**64)
    totals = settled(val_below)
    counts = totals["counts"].sum(axis=0)
    num_held_out = int(counts[HELD_OUT])
    if data.val_max_documents is not None and num_held_out > data.val_max_documents:
        say(
            f"of {num_held_out:,} documents that data.val_fraction holds out, about {data.val_max_documents:,} are"
        )
        totals = settled(val_below * data.val_max_documents // num_held_out)
        counts = totals["counts"].sum(axis=0)
    if indexed and data.val_fraction and 0 in (counts[0], counts[HELD_OUT]):
        # An exception for small corpora: at least one document trains and, of several texts, one
        # validates.
        least, most = int(totals["least"].min()), int(totals["most"].max())
        if least < most:
            counts = settled(most if counts[HELD_OUT] else least + 1)["counts"].sum(axis=0)
        elif counts[HELD_OUT]:
            counts = settled(0)["counts"].sum(axis=0)  # the only text trains
    digests = "".join(digest.hex() for digest, _ in indexed)
    return Summary(
        documents=int(counts[0] + counts[HELD_OUT]),
        dropped={str(reason): int(counts[DROP_CODES[reason]]) for reason in Drop},
        source_hash=hashlib.sha256(digests.encode()).hexdigest(),
    )


def settle(
    section: Section, *, store: Storage, key: str, decisions: Sequence[Decisions], val_below: int
) -> bytes:
    """Stores the codes of a section's chunks, and then the figures that it returns: the number of
    documents by code, and the least and the largest hash among the documents that are kept."""
    key = f"{key}/section-{section.number:05d}"
    content = store.find_bytes(key)
    if content is not None and len(content) == _SETTLED.itemsize:
        return content
    dropped = []
    for decision in decisions:
        dropped.append((DROP_CODES[decision.reason], decision.rows(section)))
    settled = np.zeros(1, _SETTLED)
    settled["least"] = _NO_HASH
    for chunk, first, index in section_indexes(store, section.chunks):
        codes = index.drops.copy()
        for code, rows in dropped:
            start, end = np.searchsorted(rows, [first, first + len(codes)])
            places = rows[start:end] - first
            undecided = codes[places] == 0
            codes[places[undecided]] = code
        hashes = leading(index.hashes)
        codes[(codes == 0) & (hashes < val_below)] = HELD_OUT
        kept = hashes[(codes == 0) | (codes == HELD_OUT)]
        settled["counts"] += np.bincount(codes, minlength=256).astype("<u8")
        settled["least"] = kept.min(initial=settled["least"][0])
        settled["most"] = kept.max(initial=settled["most"][0])
        store_codes(store, chunk, index.digest.tobytes().hex(), codes.tobytes())
    store.write_bytes(key, settled.tobytes())
    return settled.tobytes()


def store_codes(store: Storage, chunk: int, digest: str, codes: bytes) -> None:
    """Stores the codes of a chunk, and the digest of its texts, for the tasks that read it
    again."""
    store.write_bytes(_codes_key(chunk), bytes.fromhex(digest) + codes)


def stored_codes(store: Storage, chunk: int) -> tuple[str, bytes]:
    """Returns the digest of a chunk's texts and its codes."""
    content = store.read_bytes(_codes_key(chunk))
    return content[:32].hex(), content[32:]


def _codes_key(chunk: int) -> str:
    return f"{INDEX}/{chunk:05d}.codes"


def leading(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Returns the first eight bytes of hashes (N, 16) as numbers. A document validates if its
    number is in the lowest share of all: it keeps its split when others come and go, and equal
    texts are in the same split."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
