"""Saving and restoring 1.3 billion parameters: nothing large is ever made on the device beside what
training holds.

The device is torch's `meta`, whose tensors have sizes and no memory, and the process group one that
moves nothing.
"""

import json
from collections.abc import Iterator
from math import prod
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import raymill.files.stored_tensors
from cluster.settings.train import TrainConfig
from jobs.exact.run_state import run_state
from jobs.snapshots.choice import Holding, Snapshot
from jobs.snapshots.keepers import CHUNK_BYTES
from jobs.snapshots.slots import Bytes, Header
from jobs.snapshots.snapshots import Snapshots
from model.config import GPTConfig, preset_fields
from model.gpt import GPT
from raymill.files.stored_tensors import StoredTensors
from raymill.rules.adamw import AdamW
from raymill.state.flat_layout import BLOCK
from raymill.state.shard import Shard
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import restore
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.new_memory import NewMemory
from tests.jobs.shardings import sharding

META = torch.device("meta")
LARGE = GPTConfig(**preset_fields({"preset": "gpt3-1.3b"}))


class Elsewhere(Snapshots):
    """Snapshots whose shares another rank's node has, or this one's."""

    def __init__(self, group: WorkerGroup, nodes: list[str]) -> None:
        super().__init__(None, group)
        self._node_of_rank, self._node = nodes, nodes[group.rank]
        self._chunk = np.zeros(CHUNK_BYTES, np.uint8)

    def _read(self, held: Holding, spans: list[range]) -> Iterator[Bytes]:
        return (self._chunk[: len(span)] for span in spans)


class OneThread:
    """In the place of a pool, so that what it does is seen."""

    def __init__(self, num_threads: int) -> None:
        pass

    def __enter__(self) -> "OneThread":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    map = staticmethod(map)


@pytest.fixture(params=get_args(Shard))
def state(request: pytest.FixtureRequest) -> Iterator[TrainState]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with META:
        gpt = GPT(LARGE)
    divided = sharding(request.param, world_size=8)
    yield run_state(
        gpt, TrainConfig(precision="fp32"), device=META, group=WorkerGroup(0, 8), sharding=divided
    )
    dist.destroy_process_group()


def held_by(state: TrainState) -> list[Tensor]:
    return [state.values, state.gradient, *state.vectors.values()]


@pytest.mark.parametrize(
    "nodes", ["aaaaaaaa", "abbbbbbb", "baaaaaaa"], ids=["read here", "sent", "received"]
)
def test_a_restore_needs_a_piece_at_a_time(state: TrainState, nodes: str) -> None:
    shares = []
    for rank in range(8):
        num_bytes = 12 * state.layout.parts(rank, world_size=8).num_values
        header = Header(1, 7, rank, 8, 7, ["values", *AdamW.vectors], {}, 1, num_bytes, 0)
        shares.append([Holding("a", f"share-{rank}-of-8", 0, header)])
    with NewMemory(held_by(state), META) as new:
        Elsewhere(WorkerGroup(0, 8), list(nodes)).load(Snapshot(shares), state)
    assert state.num_updates == 7
    assert new.largest_bytes <= CHUNK_BYTES


@pytest.mark.more
def test_of_a_checkpoint_is_read_what_is_kept_and_nothing_is_made(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = {"step": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}
    end = 8
    for name, shape in state.shapes.items():
        for part in ("", *(f"{moment}." for moment in AdamW.vectors)):
            start, end = end, end + 4 * prod(shape)
            header[part + name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content = len(content).to_bytes(8, "little") + content
    zeros, num_read, longest = bytes(16 << 20), 0, 0

    def read(file: str, start: int, end: int) -> bytes:
        nonlocal num_read, longest
        if start < len(content):
            return content[start:end]
        num_read, longest = num_read + end - start, max(longest, end - start)
        return zeros[: end - start]

    monkeypatch.setattr(raymill.files.stored_tensors, "ThreadPoolExecutor", OneThread)
    with NewMemory(held_by(state), META) as new:
        restore(state, StoredTensors(["all"], read, source="zeros"))
    assert state.num_updates == 0
    assert new.largest_bytes <= 4, "the count of updates is not among what is known"
    assert longest <= len(zeros)
    kept = 4 * (len(state.values) + sum(map(len, state.vectors.values())))
    assert 0.99 * kept < num_read <= kept + 8


def test_sharded_weights_come_together_bucket_by_bucket(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real one has no way to pass on what has no memory.
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda messages: [])
    if not state.sharding.divided.values:
        assert len(state.values) == state.layout.size
        return
    with NewMemory(held_by(state), META) as new:
        for number, bucket in enumerate(state.layout.buckets):
            StateShares(state).brought("values", bucket, bucket=number)
    largest_bucket = max(map(len, state.layout.buckets))
    assert 0 < new.largest_bytes <= 4 * (largest_bucket + 8 * BLOCK) < 32 << 20


def test_shares_are_views(state: TrainState) -> None:
    with NewMemory(held_by(state), META) as new:
        share = StateShares(state).views(0, world_size=8)
    assert new.largest_bytes == 0
    num_values = sum(len(view) for views in share.values() for view in views)
    assert num_values == 3 * state.layout.parts(0, world_size=8).num_values
