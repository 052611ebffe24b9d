"""The order of a GPU's streams: no operation of a step touches memory that another stream still
uses, or has not yet filled.

A rank's own code runs on tensors without memory, beside a model of streams, events and PyTorch's
allocator (`tests/jobs/ranks/streams`): sums beside backward, gathered weights, updates that go
round, copies to the host.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from raymill.side_thread import SideStream
from raymill.state.host_copies import HostCopies
from raymill.sums.lane_sums import FinalBuckets
from tests.jobs.ranks.one_rank import META, OneRank, config_of, nothing_to_read
from tests.jobs.ranks.streams import ModelThread, Timeline

NUM_STEPS = 3
WORLDS: dict[str, tuple[dict[str, Any], int]] = {
    "alone": ({"shard": "none", "lanes": 3}, 1),
    "none": ({"shard": "none", "lanes": 16}, 8),
    "none, of seven": ({"shard": "none", "lanes": 13}, 7),
    "optimizer": ({"shard": "optimizer", "lanes": 16}, 8),
    "gradients": ({"shard": "gradients", "lanes": 16, "precision": "bf16"}, 8),
    "gradients in groups": ({"shard": "gradients", "lanes": 13, "group": 2}, 6),
    "parameters": ({"shard": "parameters", "lanes": 16}, 8),
    "parameters in groups": (
        {
            "shard": "parameters",
            "lanes": 16,
            "group": 4,
            "precision": "bf16",
            "micro_batches": 2,
        },
        8,
    ),
}
"""By name: the settings, and the number of ranks."""


def timeline_of(world: str) -> Timeline:
    """Returns what rank 1, or the only one, does in some steps, each with a snapshot of its
    state."""
    settings, world_size = WORLDS[world]
    timeline = Timeline()

    def take(pieces: Iterator[Tensor]) -> None:
        for piece in pieces:
            timeline.read_on_host(piece)

    with pytest.MonkeyPatch.context() as patched:
        thread = ModelThread(timeline)
        patched.setattr("raymill.state.host_copies.ThreadPoolExecutor", lambda *_: thread)
        # Whoever reads values on the host waits for them
        figures_are_read = nothing_to_read(timeline.main.synchronize)
        with timeline.in_place_of_cuda(), figures_are_read:
            config = config_of(**settings)
            one = OneRank(config, rank=min(1, world_size - 1), world_size=world_size)
            state = one.state
            state.copies = HostCopies(torch.device("cuda"))
            buffers = [torch.empty(state.copies._piece_values, device=META) for _ in range(2)]
            state.copies._buffers += buffers  # pinned memory, which this process has not
            for step in range(1, NUM_STEPS + 1):
                one.step(step)
                state.copies.start("snapshot", [state.values, *state.vectors.values()], take)
            state.copies.wait()
    return timeline


@pytest.mark.parametrize("world", WORLDS)
def test_no_two_streams_meet_in_memory(world: str) -> None:
    timeline = timeline_of(world)
    assert timeline.num_operations > 100 * NUM_STEPS
    assert timeline.races == []


def submit_at_once(side: SideStream, call: Any, *arguments: object) -> None:
    with torch.cuda.stream(side._stream):
        call(*arguments)


def do_not_wait(*_: object, **__: object) -> None:
    pass


def nothing_to_wait_for(timeline: Timeline, messages: list[Any]) -> list[Any]:
    exchange(timeline, messages)
    return []


def begin_too_early(final: FinalBuckets) -> None:
    """Counts one gradient of each bucket as there before it is."""
    final._num_unfinished = [count - 1 for count in final._num_parameters]
    final._next = 0
    final._report()


def send_without_record(sums: Any, bucket: int) -> None:
    """Sends a piece of memory that nobody tells the allocator about."""
    piece = sums._pieces.pop(bucket)
    sums._side_work.submit(sums._add, bucket, piece, sums._plan, sums._turn, sums._observers)


def piece_at_once(arriving: Any) -> Tensor:
    piece: Tensor = arriving.piece
    return piece


exchange = Timeline._exchange
SIDE, STATE = "raymill.side_thread.SideStream", "raymill.state"
FAULTS = [
    ("none", f"{SIDE}.submit", submit_at_once, "a message beside add"),
    ("none", f"{SIDE}.wait", do_not_wait, "main stream has cat beside cat of stream"),
    ("none", "raymill.sums.lane_sums.FinalBuckets.begin", begin_too_early, "beside"),
    ("none", "tests.jobs.ranks.streams.Timeline._exchange", nothing_to_wait_for, "a message"),
    ("optimizer", f"{SIDE}.wait", do_not_wait, "beside"),
    ("gradients", f"{SIDE}.submit", submit_at_once, "beside"),
    (
        "gradients",
        "raymill.sums.shard_sums.ShardSums._send",
        send_without_record,
        "memory is free again",
    ),
    (
        "parameters",
        f"{STATE}.gathered_weights._NUM_SLOTS",
        1,
        "main stream has sum beside a message",
    ),
    ("parameters", f"{SIDE}.wait", do_not_wait, "beside"),
    ("none", f"{STATE}.host_copies.HostCopies.wait", do_not_wait, "_fused_adamw_ beside copy_"),
    (
        "none",
        f"{STATE}.host_copies._Arriving.wait",
        piece_at_once,
        "a read on the host beside copy_",
    ),
]


@pytest.mark.parametrize(
    ("world", "place", "fault", "expected"),
    FAULTS,
    ids=[f"{world}: {place.rpartition('.')[2]}" for world, place, *_ in FAULTS],
)
def test_a_wait_that_is_left_out_is_found(
    world: str, place: str, fault: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, fault)
    races = timeline_of(world).races
    assert any(expected in race for race in races), races
