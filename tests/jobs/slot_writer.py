"""Writes one state after another into slots until it is killed, and prints each step that it has
written.

python -m tests.jobs.slot_writer PATH STEP
"""

import os
import sys
from pathlib import Path

import numpy as np

from jobs.snapshots.slots import Bytes, Header, Slots

NUM_BYTES = 3 * (5 << 18)  # three tensors of more than a chunk each


def mapped(path: str | Path) -> Slots:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, Slots.bytes_needed(NUM_BYTES))
    return Slots(descriptor)


def arrays(step: int) -> list[Bytes]:
    """Returns three tensors whose every value depends on the step."""
    return [np.full(NUM_BYTES // 12, step + part, np.float32).view(np.uint8) for part in range(3)]


def header_of(step: int) -> Header:
    return Header(
        attempt=1,
        step=step,
        rank=0,
        world_size=1,
        num_updates=step,
        names=["values", "exp_avg", "exp_avg_sq"],
        carried={"losses": [0.1, 0.2]},
    )


if __name__ == "__main__":
    slots, step = mapped(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        slots.write(header_of(step), arrays(step))
        os.write(1, b"%d\n" % step)
