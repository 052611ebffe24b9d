"""A ledger in which much happens, and the reader of a TensorBoard file."""

import math
import struct

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from cluster.storage.uris import Storage
from jobs.run.ledger import Line


def step(number: int, at_s: float, *, world_size: int = 2, loss: float = 3.0) -> Line:
    return {
        "time": at_s,
        "step": number,
        "tokens_seen": 128 * number,
        "lr": 1e-3,
        "loss": loss,
        "grad_norm": 0.5,
        "world_size": world_size,
        "attempt": 1,
        "seconds": {"load": 0.25, "forward": 0.75},
        "wall_s": 1.0,
        "tokens_per_s": 128.0,
        "mfu": 0.4,
    }


def start(attempt: int, at_s: float, *, world_size: int, after: int) -> Line:
    return {
        "event": "start",
        "time": at_s,
        "attempt": attempt,
        "world_size": world_size,
        "step": after,
    }


EVENTFUL: list[Line] = [
    start(1, 100, world_size=2, after=0),
    *(step(n, 100.0 + n) for n in range(1, 6)),
    {"event": "checkpoint", "time": 105.5, "step": 5, "checkpoint": "c"},
    {"event": "failure", "time": 106, "rank": 1, "kind": "died", "reason": "killed"},
    start(2, 116, world_size=1, after=3),  # steps 4 and 5 are taken again
    *(step(n, 113.0 + n, world_size=1) for n in range(4, 9)),
    {"event": "skip", "time": 122, "step": 9, "reason": "nan"},
    {"event": "rollback", "time": 123, "step": 9, "first": 8, "last": 9, "reason": "nan"},
    {
        "event": "validation",
        "time": 124,
        "step": 8,
        "val_loss": 2.5,
        "val_bits_per_byte": 1.5,
        "sets": {"news": {"val_loss": 2.75, "val_bits_per_byte": 1.75}},
    },
    {"event": "hang", "time": 125, "rank": 0, "seconds": 30},
    start(3, 130, world_size=1, after=7),
    step(10, 132, world_size=1, loss=math.nan),
]


def events_of(run: Storage) -> list[Event]:
    """The run's TensorBoard file, each record's checksums verified."""
    (entry,) = run.list("tensorboard/")
    assert "tfevents" in entry.key
    content, events = run.read_bytes(entry.key), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
        data = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(data),)
        events.append(Event.FromString(data))
        content = content[16 + length :]
    return events
