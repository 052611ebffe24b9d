"""Saving and restoring 1.3 billion parameters: nothing large is ever made on the device beside what training holds.

The device is torch's `meta`, whose tensors have sizes and no memory, and the process group one that moves nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.settings.run import TrainConfig
from jobs.exact.flat_layout import BLOCK
from jobs.exact.train_state import MOMENTS, TrainState
from jobs.snapshots.choice import Holding, Snapshot
from jobs.snapshots.keepers import CHUNK_BYTES
from jobs.snapshots.slots import Bytes, Header
from jobs.snapshots.snapshots import Snapshots
from jobs.workers.worker_group import WorkerGroup
from model.config import GPTConfig, preset_fields
from model.gpt import GPT

META = torch.device("meta")
LARGE = GPTConfig(**preset_fields({"preset": "gpt3-1.3b"}))


class NewMemory(TorchDispatchMode):
    """Sees the size of each tensor on the device that is no view of an earlier one."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = list(known)  # alive, so that their storages' ids are theirs alone
        self._ids = {tensor.untyped_storage()._cdata for tensor in self._known}
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ids:
                    self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return made


class Elsewhere(Snapshots):
    """Snapshots whose shares another rank's node has, or this one's."""

    def __init__(self, group: WorkerGroup, nodes: list[str]) -> None:
        super().__init__(None, group)
        self._node_of_rank, self._node = nodes, nodes[group.rank]
        self._chunk = np.zeros(CHUNK_BYTES, np.uint8)

    def _read(self, held: Holding, spans: list[range]) -> Iterator[Bytes]:
        return (self._chunk[: len(span)] for span in spans)


@pytest.fixture(params=["none", "optimizer"])
def state(request: pytest.FixtureRequest) -> Iterator[TrainState]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with META:
        model = GPT(LARGE)
    yield TrainState(model, TrainConfig(), device=META, group=WorkerGroup(0, 8), shard=request.param)
    dist.destroy_process_group()


def held_by(state: TrainState) -> list[Tensor]:
    return [state.values, state.gradient, *state.moments.values()]


@pytest.mark.parametrize("nodes", ["aaaaaaaa", "abbbbbbb", "baaaaaaa"], ids=["read here", "sent", "received"])
def test_a_restore_needs_a_piece_at_a_time(state: TrainState, nodes: str) -> None:
    shares = []
    for rank in range(8):
        num_bytes = 12 * sum(map(len, state.layout.parts(rank, world_size=8)))
        header = Header(1, 7, rank, 8, 7, ["values", *MOMENTS], {}, 1, num_bytes, 0)
        shares.append([Holding("a", f"share-{rank}-of-8", 0, header)])
    with NewMemory(held_by(state)) as new:
        Elsewhere(WorkerGroup(0, 8), list(nodes)).restore(Snapshot(shares), state)
    assert state.num_updates == 7
    assert new.largest_bytes <= CHUNK_BYTES


def test_a_checkpoint_is_loaded_without_new_memory(state: TrainState) -> None:
    parameters = state.model.named_parameters()
    stored = {f"{moment}.{name}": torch.empty_like(weights) for name, weights in parameters for moment in MOMENTS}
    with NewMemory([*held_by(state), *stored.values()]) as new:
        state.load_moments(stored | {"step": torch.tensor(3)})
    assert state.num_updates == 3
    assert new.largest_bytes <= 4, "the count of updates is not among what is known"


def test_sharded_moments_come_together_bucket_by_bucket(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerGroup, "prove", lambda *_: None)  # which would find that nothing has arrived
    monkeypatch.setattr(
        dist, "batch_isend_irecv", lambda messages: []
    )  # which has no way to pass on what has no memory
    if not state.is_sharded:
        assert all(len(moment) == state.layout.size for moment in state.moments.values())
        return
    host = {name: torch.empty(state.layout.size, device=META) for name in MOMENTS}
    with NewMemory([*held_by(state), *host.values()]) as new:
        state.gather(host, step=1)
    largest_bucket = max(map(len, state.layout.buckets))
    assert 0 < new.largest_bytes <= 4 * (largest_bucket + 8 * BLOCK) < 32 << 20


def test_shares_are_views(state: TrainState) -> None:
    with NewMemory(held_by(state)) as new:
        share = state.share(0, world_size=8)
    assert new.largest_bytes == 0
    num_values = sum(len(view) for views in share.values() for view in views)
    assert num_values == 3 * sum(map(len, state.layout.parts(0, world_size=8)))
