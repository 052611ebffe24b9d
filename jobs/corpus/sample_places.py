"""Where in a source the tokenizer's sample is taken: places all over it, a pure function of its files' sizes.

A source is thought of as one stretch of text, its files end to end. It is divided into equal stretches, and a hash says
at which byte of each the reading begins. So little of a huge source is read, from everywhere, and always the same.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from jobs.corpus.chunks import EXPANSION, Part, text_step, whole_file
from jobs.corpus.listing import CorpusFile
from jobs.corpus.text_hashes import mix64

_PLACE_BYTES = 256 << 10  # 1,024 places at the default of data.tokenizer_sample_bytes
_LEAST_PLACE_BYTES = 4 << 10
_LEAST_PLACES = 64  # of a sample that has room for as many

Numbered = Sequence[tuple[int, CorpusFile]]


def is_sampled(files: Sequence[CorpusFile], share_bytes: int) -> bool:
    """Whether the files of a source are more than its share of the sample."""
    return sum(map(_text_bytes, files)) > share_bytes


def sample_places(
    files: Numbered, *, share_bytes: int, max_document_bytes: int
) -> Iterator[tuple[int, Iterator[Part]]]:
    """(bytes of text to take, parts to take them from) of each place; together the parts are the whole source.

    A place's parts reach up to the next place, so that one where much is dropped can read on. `files` are those of a
    source, with their numbers in the listing. An archive and a csv file can be entered at the front only: there the
    places in it come together.
    """
    if not is_sampled([file for _, file in files], share_bytes):
        yield share_bytes, (whole_file(number, file) for number, file in files)
        return
    offsets = [0, *accumulate(_text_bytes(file) for _, file in files)]
    total = offsets[-1]
    num_places = -(-share_bytes // min(_PLACE_BYTES, max(_LEAST_PLACE_BYTES, share_bytes // _LEAST_PLACES)))
    hashes = mix64(np.arange(1, num_places + 1, dtype=np.uint64)).tolist()
    found: Counter[int] = Counter()
    for number, fraction in enumerate(hashes):  # in 64 bits
        offset = ((number << 64) + fraction) * total // num_places >> 64
        place = bisect_right(offsets, offset) - 1
        found[offsets[place] + _entrance(files[place][1], offset - offsets[place], max_document_bytes)] += 1
    starts = sorted(found)
    for start, end in zip(starts, [*starts[1:], total + starts[0]], strict=True):
        yield found[start] * share_bytes // num_places, _between(files, offsets, start, end)


def _between(files: Numbered, offsets: list[int], start: int, end: int) -> Iterator[Part]:
    """The parts in a stretch of the source, which goes on at its front after its end."""
    position, total = start, offsets[-1]
    while position < end:
        turn, offset = position - position % total, position % total
        place = bisect_right(offsets, offset) - 1
        first, last = offsets[place : place + 2]
        part = whole_file(*files[place])
        if _is_divisible(files[place][1]):
            part = replace(part, start=offset - first, end=min(last, end - turn) - first)
        yield part
        position = turn + last


def _text_bytes(file: CorpusFile) -> int:
    return file.size * EXPANSION[file.compression]


def _is_divisible(file: CorpusFile) -> bool:
    return not file.compression and file.kind != "csv"


def _entrance(file: CorpusFile, offset: int, max_document_bytes: int) -> int:
    """The last byte up to the offset at which reading can begin."""
    if not _is_divisible(file) or (file.kind == "txt" and file.size <= max_document_bytes):
        return 0
    return offset - offset % text_step(max_document_bytes) if file.kind == "txt" else offset
