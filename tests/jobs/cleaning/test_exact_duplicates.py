"""Exact duplicates: the first in canonical order stays, whatever the order of adding and the size of the buffers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cleaning import disk_buckets as spool
from jobs.cleaning.duplicates import Duplicates
from tests.time_limits import limit_s


def as_hashes(numbers: list[int]) -> np.ndarray:
    """Returns hashes (D, 16), most pairs of which are equal in only one of their halves."""
    values = np.array([(number % 3, number // 3) for number in numbers], dtype=">u8").reshape(-1, 2)
    return (values * np.uint64(0x3F00000000000001)).astype(">u8").view(np.uint8).reshape(-1, 16)


@given(chunks=st.lists(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=12), max_size=8), data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_first_of_equal_hashes_stays(
    chunks: list[list[tuple[int, bool]]], data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_BUFFER_BYTES", data.draw(st.sampled_from([1, 100, 1 << 20])))
    with Duplicates(tmp_path) as duplicates:
        for chunk in data.draw(st.permutations(range(len(chunks)))):
            documents = np.array([place for place, (_, usable) in enumerate(chunks[chunk]) if usable], dtype=np.int64)
            duplicates.add(chunk, documents, as_hashes([number for number, usable in chunks[chunk] if usable]))
        duplicates.find()
        seen: set[int] = set()
        for chunk, members in enumerate(chunks):
            expected = []
            for place, (number, usable) in enumerate(members):
                if usable and number in seen:
                    expected.append(place)
                seen |= {number} if usable else set()
            assert duplicates.dropped_in(chunk).tolist() == expected


def test_no_file_is_left_and_misuse_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with Duplicates(folder) as duplicates:
        duplicates.add(7, np.arange(3), as_hashes([1, 1, 2]))
        with pytest.raises(AssertionError, match="chunk 7"):
            duplicates.add(7, np.arange(1), as_hashes([1]))
        duplicates.find()
        assert duplicates.dropped_in(7).tolist() == [1]
        with pytest.raises(KeyError):
            duplicates.dropped_in(8)
        assert list(folder.iterdir()) == []


FILL = """
import sys
from pathlib import Path
import numpy as np
from jobs.cleaning.duplicates import Duplicates
from jobs.cleaning.duplicates import NearDuplicates

def peak_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

kind, folder, num_chunks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng, before, dropped = np.random.default_rng(0), peak_bytes(), 0
with Duplicates(folder) if kind == "exact" else NearDuplicates(folder, threshold=0.7) as search:
    for chunk in range(num_chunks):  # half of each chunk's documents repeat the chunk before
        values = rng.integers(0, 256, (2000, 16 if kind == "exact" else 256), dtype=np.uint8)
        if chunk:
            values[:1000] = former[1000:]
        former = values
        search.add(chunk, np.arange(2000), values if kind == "exact" else values.view(np.uint16))
    search.find()
    dropped = sum(len(search.dropped_in(chunk)) for chunk in range(num_chunks))
assert dropped == (num_chunks - 1) * 1000, dropped
print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("kind", "chunks"), [("exact", 500), ("near", 50)])
def test_memory_is_bounded(kind: str, chunks: int, tmp_path: Path) -> None:
    """10^6 documents exactly, 10^5 nearly: far less than their records (24 MB; 66 MB), but for buffers."""
    command = [sys.executable, "-c", FILL, kind, str(tmp_path), str(chunks)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s(60)).stdout
    assert int(output) < 60 << 20
