"""Bytes and messages of a step's exchange, counted as the code that runs hands them over, without
anybody to receive them.

This process is rank 0 of as many as are asked for. What it would receive is whatever its memory
holds.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.plan.exchange import between_groups, between_holders
from jobs.plan.memory import layout_of
from model.gpt import GPT
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from raymill.sums.step_totals import Measured, StepTotals
from raymill.workers.worker_group import WorkerGroup

NODE = 8  # ranks
SIZE = {"n_layer": 3, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "n_positions": 16}


class Rows:
    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(len(indices), SIZE["n_positions"], dtype=torch.int64)
        return rows, rows

    def read_ahead(self, indices: Any) -> None:
        pass


class Sent:
    def __init__(self) -> None:
        self.within = self.between = 0  # bytes that stay on the node, and that leave it
        self.num_messages = 0
        self._lock = threading.Lock()  # several threads send

    def add(self, peer: int, num_bytes: int) -> None:
        if peer and num_bytes:
            with self._lock:
                self.num_messages += 1
                self.within += num_bytes * (peer < NODE)
                self.between += num_bytes * (peer >= NODE)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    sent = Sent()

    def exchange(messages: list[dist.P2POp]) -> list[dist.Work]:
        for message in messages:
            if message.op is dist.isend:
                sent.add(message.peer, message.tensor.nbytes)
        return []

    def all_to_all(
        found: Tensor, own: Tensor, found_lengths: list[int], own_lengths: list[int]
    ) -> None:
        for peer, length in enumerate(own_lengths):
            sent.add(peer, length * own.itemsize)

    with monkeypatch.context() as patched:
        patched.setattr(dist, "batch_isend_irecv", exchange)
        patched.setattr(dist, "all_to_all_single", all_to_all)
        patched.setattr(StepTotals, "finish", lambda *_, **__: Measured(0.0, 0.0, 1))
        patched.setattr(WorkerGroup, "prove", lambda *_: None)
        yield sent


def sent_by_rank_0(
    monkeypatch: pytest.MonkeyPatch,
    shard: Shard,
    world_size: int,
    *,
    group: int | None = None,
    lanes: int,
    precision: str = "fp32",
) -> Sent:
    """Returns what rank 0 sends in a step and its update."""
    config = RunConfig.model_validate(
        {
            "model": SIZE,
            "train": {
                "global_batch_size": lanes,
                "micro_batch_size": 1,
                "max_tokens": 10**9,
                "precision": precision,
                "compute": "plain",
            },
            "scaling": {"max_workers": world_size, "shard": shard, "shard_group": group},
        }
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        model = GPT(config.model)
        model.init_weights(0)
        workers = WorkerGroup(0, world_size)
        divided = run_sharding(config.scaling, rank=0, world_size=world_size)
        state = run_state(
            model, config.train, device=torch.device("cpu"), group=workers, sharding=divided
        )
        gradient = step_gradient(config, state, Rows(), workers, eot_id=None)  # type: ignore[arg-type]
        with counted(monkeypatch) as sent:
            gradient.of_step(1, StepTimer())
            state.apply(norm=0.0, learning_rate=0.0)
        gradient.close()
        state.close()
    finally:
        dist.destroy_process_group()
    return sent


NUM_VALUES = layout_of(RunConfig.model_validate({"model": SIZE})).size


def ring(world_size: int) -> float:
    """The bytes that a rank sends in a ring all-reduce, in fp32."""
    return 8 * NUM_VALUES * (world_size - 1) / world_size


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_each_gpu_of_a_node_sends_an_eighth_through_its_network_card(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    flat = sent_by_rank_0(monkeypatch, "none", world_size, lanes=world_size)
    owned = sent_by_rank_0(monkeypatch, "optimizer", world_size, lanes=world_size)
    groups = sent_by_rank_0(monkeypatch, "gradients", world_size, group=NODE, lanes=world_size)
    for name, sent in (("none", flat), ("optimizer", owned), ("groups", groups)):
        shares = [part / ring(world_size) for part in (sent.within, sent.between)]
        print(
            f"{world_size} ranks, {name}: {shares[0]:.3f} + {shares[1]:.3f} of a ring, {sent.num_messages} messages"
        )
    num_nodes = world_size // NODE
    through_card = 8 * NUM_VALUES / NODE * (num_nodes - 1) / num_nodes
    for sent in (flat, owned, groups):
        assert sent.between == pytest.approx(through_card, rel=0.2), "parts are whole blocks"
    assert flat.within + flat.between == pytest.approx(ring(world_size), rel=0.1)


@pytest.mark.parametrize("world_size", [6, 8, 64, 512])
@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_the_planner_counts_the_messages_that_are_sent(
    monkeypatch: pytest.MonkeyPatch, shard: Shard, world_size: int
) -> None:
    sent = sent_by_rank_0(monkeypatch, shard, world_size, lanes=2 * world_size)
    config = RunConfig.model_validate({"model": SIZE, "scaling": {"shard": shard}})
    sharding = run_sharding(config.scaling, rank=0, world_size=world_size)
    layout, options = layout_of(config), PlanConfig(gpus_per_node=NODE)
    planned = between_groups(layout, sharding, options, num_lanes=2 * world_size)
    if shard == "optimizer":
        planned += between_holders(layout, sharding, options)
    if world_size == 6:
        assert sent.num_messages <= planned.num_messages, "another rank sends most"
        return
    # Parts of a small model may have no block, and are not sent
    assert 0.6 * planned.num_messages <= sent.num_messages <= planned.num_messages
    assert world_size > NODE or sent.num_messages == planned.num_messages


def test_a_world_that_lost_one_of_eight_sends_little_more_than_a_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = sent_by_rank_0(monkeypatch, "none", 7, lanes=64)
    assert sent.within <= 1.5 * 1.02 * ring(7), (
        "rank 0 has two subtrees; seven have eleven, 1.29 times a ring's"
    )


def test_bf16_halves_what_leaves_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {
        precision: sent_by_rank_0(monkeypatch, "parameters", 8, lanes=8, precision=precision).within
        for precision in ("fp32", "bf16")
    }
    blocks = sum(map(len, layout_of(RunConfig.model_validate({"model": SIZE})).decoder_blocks))
    # Forward, backward and the gradient pass on each block's parts; its last two are still there
    # for backward.
    passes = (3 * blocks - 2 * blocks / 3) * 7 / 8
    assert sent["fp32"] - sent["bf16"] == pytest.approx(2 * passes, rel=0.02)
