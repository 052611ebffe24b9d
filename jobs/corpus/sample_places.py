"""Chooses the places in a source where the tokenizer's sample is taken, as a pure function of its
files' sizes.

The files of a source, end to end, are divided into equal stretches, and a hash says at which byte
of each stretch reading begins. So little of a huge source is read, from all over it, and always the
same text.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from cluster.settings.data import DataConfig
from jobs.corpus.chunks import EXPANSION, Part, is_divisible, text_step, whole_file
from jobs.corpus.listing import CorpusFile
from jobs.corpus.text_hashes import mix64

_PLACE_BYTES = 256 << 10  # 1,024 places at the default of data.tokenizer_sample_bytes
_LEAST_PLACE_BYTES = 4 << 10
_LEAST_PLACES = 64  # where the sample has room for as many


def sample_places(
    files: Sequence[CorpusFile], data: DataConfig, *, share_bytes: int
) -> Iterator[tuple[int, Iterator[Part]]]:
    """Yields (bytes of text to take, parts to take them from) for each place; the parts together
    are the whole source.

    A place's parts reach up to the next place, so that a place where much is dropped can read
    further. The files are those of one source. An archive or csv file can be entered only at its
    front, so all the places in it are there.
    """
    offsets = [0, *accumulate(file.size * EXPANSION[file.compression] for file in files)]
    total = offsets[-1]
    if total <= share_bytes:
        yield share_bytes, map(whole_file, files)
        return
    num_places = -(
        -share_bytes // min(_PLACE_BYTES, max(_LEAST_PLACE_BYTES, share_bytes // _LEAST_PLACES))
    )
    hashes = mix64(np.arange(1, num_places + 1, dtype=np.uint64)).tolist()
    found: Counter[int] = Counter()
    for number, fraction in enumerate(hashes):  # a fraction of 2^64
        offset = ((number << 64) + fraction) * total // num_places >> 64
        place = bisect_right(offsets, offset) - 1
        found[
            offsets[place]
            + _entrance(files[place], offset - offsets[place], data.max_document_bytes)
        ] += 1
    starts = sorted(found)
    for start, end in zip(starts, [*starts[1:], total + starts[0]], strict=True):
        yield found[start] * share_bytes // num_places, _between(files, offsets, start, end)


def _between(
    files: Sequence[CorpusFile], offsets: list[int], start: int, end: int
) -> Iterator[Part]:
    """Yields the parts of a stretch of the source; after the source's end comes its front again."""
    position, total = start, offsets[-1]
    while position < end:
        turn, offset = position - position % total, position % total
        place = bisect_right(offsets, offset) - 1
        first, last = offsets[place : place + 2]
        file = files[place]
        yield (
            Part(file, offset - first, min(last, end - turn) - first)
            if is_divisible(file)
            else whole_file(file)
        )
        position = turn + last


def _entrance(file: CorpusFile, offset: int, max_document_bytes: int) -> int:
    """Returns the last byte, up to the offset, at which reading can begin."""
    if not is_divisible(file) or (file.kind == "txt" and file.size <= max_document_bytes):
        return 0
    return offset - offset % text_step(max_document_bytes) if file.kind == "txt" else offset
