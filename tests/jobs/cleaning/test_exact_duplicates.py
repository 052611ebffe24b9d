"""Exact duplicates: the first in canonical order stays, whatever the order of adding and the size of the buffers."""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cleaning import disk_buckets
from jobs.cleaning.duplicates import Duplicates
from tests.time_limits import limit_s


def as_hashes(numbers: list[int]) -> np.ndarray:
    """Returns hashes (D, 16), most pairs of which are equal in only one of their halves."""
    values = np.array([(number % 3, number // 3) for number in numbers], dtype=">u8").reshape(-1, 2)
    return (values * np.uint64(0x3F00000000000001)).astype(">u8").view(np.uint8).reshape(-1, 16)


@given(
    parts=st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=8),
    buffer_bytes=st.sampled_from([1, 100, 1 << 20]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_first_of_equal_hashes_stays(
    parts: list[list[int]], buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_buckets, "_BUFFER_BYTES", buffer_bytes)
    numbers = list(chain.from_iterable(parts))
    with Duplicates(tmp_path) as duplicates:
        for part in parts:
            duplicates.add(as_hashes(part))
        assert duplicates.find().tolist() == [number in numbers[:place] for place, number in enumerate(numbers)]


def test_no_file_is_left(tmp_path: Path) -> None:
    with Duplicates(tmp_path) as duplicates:
        duplicates.add(as_hashes([1, 1, 2]))
        assert duplicates.find().tolist() == [False, True, False]
        assert list(tmp_path.iterdir()) == []


FILL = """
import sys
from pathlib import Path
import numpy as np
from jobs.cleaning.duplicates import Duplicates
from jobs.cleaning.duplicates import NearDuplicates

def peak_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

kind, folder, num_chunks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng, before = np.random.default_rng(0), peak_bytes()
with Duplicates(folder) if kind == "exact" else NearDuplicates(folder, threshold=0.7) as search:
    for chunk in range(num_chunks):  # half of each chunk's documents repeat the chunk before
        values = rng.integers(0, 256, (2000, 16 if kind == "exact" else 256), dtype=np.uint8)
        if chunk:
            values[:1000] = former[1000:]
        former = values
        search.add(values if kind == "exact" else values.view(np.uint16))
    dropped = int(search.find().sum())
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
