"""Two slots in shared memory: a writer that is killed at any moment leaves one of them whole, and
damage is seen."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.snapshots.slots import Bytes, Slots
from tests.jobs.slot_writer import NUM_BYTES, arrays, header_of, mapped


def whole_steps(slots: Slots) -> list[int]:
    """Returns the steps of the whole slots, oldest first, after checking that their data are those
    of their step."""
    steps = []
    for slot in range(2):
        header = slots.header(slot)
        if header is not None and slots.is_whole(slot):
            for array, expected in zip(
                slots.data(slot)[:NUM_BYTES].reshape(3, -1), arrays(header.step), strict=True
            ):
                assert np.array_equal(array, expected)
            steps.append(header.step)
    return sorted(steps)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


def test_the_two_newest_are_kept(path: Path) -> None:
    slots = mapped(path)
    assert whole_steps(slots) == []
    for step in range(1, 6):
        slots.write(header_of(step), arrays(step))
    assert whole_steps(mapped(path)) == [4, 5]
    newest = max(
        (mapped(path).header(slot) for slot in range(2)),
        key=lambda found: found.step if found else 0,
    )
    assert newest is not None
    assert newest.carried == {"losses": [0.1, 0.2]}


def test_a_writer_killed_at_any_moment_leaves_a_whole_slot(path: Path) -> None:
    """Real SIGKILLs; the newest whole state is the last one that the writer reported, or a later
    one."""
    rng, step = random.Random(7), 0
    slots = mapped(path)
    for _ in range(8):
        command = [sys.executable, "-m", "tests.jobs.slot_writer", str(path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            written = int(writer.stdout.readline())
            time.sleep(rng.random() * 0.02)
            writer.send_signal(signal.SIGKILL)
            written = max([written, *map(int, writer.stdout.read().split(b"\n")[:-1])])
        assert whole_steps(slots)[-1] >= written > step
        step = whole_steps(slots)[-1]


@settings(max_examples=20, deadline=None)
@given(crash_at=st.integers(0, 2))
def test_a_copy_that_stops_half_way_leaves_the_other_slot(
    crash_at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class CrashError(Exception):
        pass

    class Crashing(list[Bytes]):
        def __iter__(self):
            yield from self[:crash_at]
            raise CrashError

    slots = mapped(tmp_path_factory.mktemp("slots") / "slots")
    slots.write(header_of(1), arrays(1))
    slots.write(header_of(2), arrays(2))
    with pytest.raises(CrashError):
        slots.write(header_of(3), Crashing(arrays(3)))
    assert whole_steps(slots) == [2]
    slots.write(header_of(3), arrays(3))  # into the torn one
    assert whole_steps(slots) == [2, 3]


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, NUM_BYTES - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    slots = mapped(tmp_path_factory.mktemp("slots") / "slots")
    slots.write(header_of(1), arrays(1))
    newest = slots.write(header_of(2), arrays(2))
    slots.data(newest)[place] ^= 1 << bit
    assert whole_steps(slots) == [1]


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 200), bit=st.integers(0, 7))
def test_a_damaged_header_is_no_header(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("slots") / "slots"
    slots = mapped(path)
    slots.write(header_of(1), arrays(1))
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
    assert whole_steps(slots) == []


def test_swapped_chunks_are_seen(path: Path) -> None:
    slots = mapped(path)
    slot = slots.write(header_of(1), arrays(1))
    data = slots.data(slot)[:NUM_BYTES].reshape(3, -1)
    data[[0, 1]] = data[[1, 0]]
    assert not slots.is_whole(slot)
