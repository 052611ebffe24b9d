"""Exact duplicates: the first in canonical order stays, however sections and partitions are cut, in
bounded memory."""

import subprocess
import sys
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.uris import open_storage
from jobs.cleaning import disk_buckets
from jobs.cleaning.duplicates import HASHED
from jobs.cleaning.exchange import Exchange, sections_of
from tests.jobs.cleaning.in_process import MEMORY, WHOLE, InProcess, exact_duplicates
from tests.repository import REPOSITORY
from tests.time_limits import limit_s


def as_hashes(numbers: list[int]) -> np.ndarray:
    """Returns hashes (D, 16), most pairs of which are equal in only one of their halves."""
    values = np.array([(number % 3, number // 3) for number in numbers], dtype=">u8").reshape(-1, 2)
    return (values * np.uint64(0x3F00000000000001)).astype(">u8").view(np.uint8).reshape(-1, 16)


@given(
    parts=st.lists(st.lists(st.integers(0, 20), max_size=12), min_size=1, max_size=8),
    buffer_bytes=st.sampled_from([1, 100, 1 << 20]),
    least=st.sampled_from([1, 10, 100]),
    task_bytes=st.sampled_from([30, 500, WHOLE]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_the_first_of_equal_hashes_stays(
    parts: list[list[int]], buffer_bytes: int, least: int, task_bytes: int, seed: int
) -> None:
    """In any number of sections and partitions, whatever the order of the tasks and the size of the
    buffers."""
    numbers = list(chain.from_iterable(parts))
    with TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_buckets, "_BUFFER_BYTES", buffer_bytes)
        chunks = list(map(as_hashes, parts))
        dropped = exact_duplicates(
            Path(folder), chunks, run=InProcess(seed), least=least, task_bytes=task_bytes
        )
    assert dropped == [place for place, number in enumerate(numbers) if number in numbers[:place]]


def test_sections_are_cut_by_the_corpus_alone_and_are_few() -> None:
    sections = sections_of([7] * 100_000, least=1)
    assert 1000 < len(sections) <= 1025
    assert [chunk for section in sections for chunk in section.chunks] == list(range(100_000))
    assert [len(section.chunks) for section in sections_of([5, 5, 5, 50, 1], least=10)] == [2, 2, 1]
    assert sections_of([], least=10) == []


def test_a_hash_that_a_section_repeats_is_sent_once(tmp_path: Path) -> None:
    """So no partition grows with the copies of one document."""
    crowd = [as_hashes([1] * 1000)] * 3
    assert len(exact_duplicates(tmp_path, crowd, run=InProcess())) == 2999
    sent = Exchange(open_storage(str(tmp_path)), f"index/selection-{WHOLE}/hashes", 3, 1).received(
        0, HASHED
    )
    assert list(map(len, sent)) == [1, 1, 1]


FILL = """
import sys
import numpy as np
from cluster.settings.data import DataConfig
from cluster.storage.uris import open_storage
from jobs.cleaning import deduplication
from tests.jobs.cleaning.in_process import MEMORY, InProcess, store_index

def peak_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

kind, store, num_chunks = sys.argv[1], open_storage(sys.argv[2]), int(sys.argv[3])
threshold = None if kind == "exact" else 0.7
rng, sizes, former = np.random.default_rng(0), [], None
for chunk in range(num_chunks):  # half of each chunk's documents repeat the chunk before
    hashes = rng.integers(0, 256, (2000, 16), dtype=np.uint8)
    signatures = None if threshold is None else rng.integers(0, 1 << 16, (2000, 128), dtype=np.uint16)
    if former is not None:
        hashes[:1000] = former[0][1000:]
        if signatures is not None:
            signatures[:1000] = former[1][1000:]
    former = hashes, signatures
    sizes.append(store_index(store, chunk, hashes=hashes, signatures=signatures)[1])
before = peak_bytes()
data = DataConfig(near_dedup_threshold=threshold)
search = deduplication.Deduplication(store, sizes, data, run=InProcess())
found = search.exact() if threshold is None else search.near()
dropped = sum(len(np.unique(found.rows(section))) for section in search.sections)
assert dropped == (num_chunks - 1) * 1000, dropped
print(peak_bytes() - before)
"""


@pytest.mark.more
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("kind", "chunks", "most"), [("exact", 500, 100 << 20), ("near", 100, 300 << 20)]
)
def test_memory_is_bounded(kind: str, chunks: int, most: int) -> None:
    """10^6 documents exactly, 2*10^5 nearly: that of a partition of 32 MiB and some buffers."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        command = [sys.executable, "-c", FILL, kind, folder, str(chunks)]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=limit_s(90), cwd=REPOSITORY
        ).stdout
    assert int(output.splitlines()[-1]) < most
