"""The exchange of every rank of a world: who sends what to whom, in which order, and how much, for
worlds that no machine here could run.

Each rank's own code is run in turn (`tests/jobs/ranks`). A message without a receiver, or ranks that
wait for one another, would be a training that hangs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.plan.exchange import Traffic, between_groups, between_holders, exchange
from jobs.plan.memory import gpu_memory, layout_of
from model.config import GPTConfig
from model.gpt import GPT
from raymill.state.doubling import gather_messages, teams_to_gather
from raymill.state.flat_layout import BLOCK
from raymill.state.messages import Message
from raymill.state.peers import Peers
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from raymill.sums.bucket_exchange import BucketExchange
from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.halving import HalvedSums
from raymill.sums.teams import team_plan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.ranks.matching import Wire, problems_of
from tests.jobs.ranks.one_rank import NODE, config_of, nothing_to_read, program_of, programs_of
from tests.jobs.ranks.program import Event, Program, Recorder, one_by_one
from tests.jobs.train_worlds import CPU

OPTIONS = PlanConfig(gpus_per_node=NODE)


class World(NamedTuple):
    shard: Shard
    size: int
    group: int | None = None  # ranks that hold a copy together; all if None
    lanes: int | None = None  # two for each rank if None
    precision: str = "fp32"
    micro_batches: int = 1

    def __str__(self) -> str:
        words = [f"{self.size} ranks", self.shard]
        words += [f"groups of {self.group}"] if self.group else []
        words += [f"{self.lanes} lanes"] if self.lanes else []
        words += [self.precision] if self.precision != "fp32" else []
        words += ["two micro-batches"] if self.micro_batches > 1 else []
        return ", ".join(words)

    @property
    def num_lanes(self) -> int:
        return self.lanes or 2 * self.size

    @property
    def config(self) -> RunConfig:
        return config_of(
            self.shard,
            lanes=self.num_lanes,
            group=self.group,
            precision=self.precision,
            micro_batches=self.micro_batches,
        )


EVEN = [
    World("none", 8),
    World("optimizer", 8),
    World("gradients", 8, precision="bf16"),
    World("parameters", 8),
    World("parameters", 8, 4, precision="bf16", micro_batches=2),
    World("none", 64),
    World("parameters", 64, 8),
]
"""Worlds whose ranks compute equally many lanes."""
MORE = [
    World("optimizer", 64),
    World("gradients", 64, 8),
    World("gradients", 64),
    World("parameters", 64),
]
LARGE = [
    World("none", 512),
    World("optimizer", 512),
    World("gradients", 512, 8),
    World("parameters", 512, 8, precision="bf16"),
    World("parameters", 512, 64),
]
ODD = [
    World("none", 7, lanes=64),
    World("optimizer", 7, lanes=13),
    World("gradients", 6, 3, lanes=9),
    World("parameters", 6, 2, lanes=7),
    World("parameters", 5, lanes=5),
    World("none", 12, lanes=41),
]
"""Worlds of uneven ranks, as after a loss."""


SMALL_MODEL = {"n_layer": 3, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "n_positions": 16}


def each(*worlds: Sequence[World]) -> pytest.MarkDecorator:
    params = []
    for world in [world for some in worlds for world in some]:
        marks = [pytest.mark.more] if world in MORE else []
        marks += [pytest.mark.slow] if world in LARGE else []
        params.append(pytest.param(world, marks=marks, id=str(world)))
    return pytest.mark.parametrize("world", params)


@cache
def programs(world: World) -> list[Program]:
    return programs_of(world.config, world.size)


@each(EVEN, MORE, LARGE, ODD)
def test_each_message_has_its_receiver_and_nobody_waits_in_a_circle(world: World) -> None:
    ranks = programs(world)
    assert sum(len(program.calls) for program in ranks) >= world.size * 10
    for wire in Wire:
        assert problems_of(ranks, wire) == [], wire


@each(EVEN, MORE, LARGE)
def test_each_rank_sends_the_bytes_that_the_planner_counts(world: World) -> None:
    """But for parts, which are whole blocks."""
    planned, busiest = planned_bytes(world)
    counts = [sum(len(call.sent) for call in program.calls) for program in programs(world)]
    sent = [bytes_of_step(program) for program in programs(world)]
    for count, (near, far), bytes_planned in zip(counts, sent, planned, strict=True):
        rounding = 2 * 4 * BLOCK * count
        assert near + far == pytest.approx(bytes_planned, abs=rounding)
    rounding = 2 * 4 * BLOCK * max(counts)
    assert max(near for near, _ in sent) == pytest.approx(busiest.link_bytes, abs=rounding)
    assert max(far for _, far in sent) == pytest.approx(busiest.card_bytes, abs=rounding)
    num_messages = max(counts) - (world.size - 1)  # without the figures, which all tell all
    # Parts of a few vectors may have no block, and are not sent
    assert 0.6 * busiest.num_messages <= num_messages <= busiest.num_messages


@each(EVEN, MORE, LARGE)
def test_each_rank_holds_what_the_planner_counts(world: World) -> None:
    """But for a block of each bucket."""
    layout = layout_of(world.config)
    parts = gpu_memory(world.config, layout, world_size=world.size)
    most = 2 * 4 * BLOCK * len(layout.buckets)  # of two vectors
    for program in programs(world):
        for name, held in program.held.items():
            assert held == pytest.approx(parts[name], abs=most), (program.rank, name)
        assert program.received_bytes <= parts["exchange"] + most
    if world.shard == "none":  # else more than others' sums arrives
        received = max(program.received_bytes for program in programs(world))
        assert received == pytest.approx(parts["exchange"], abs=most)


class Zeros:
    """The rows of a corpus of one token."""

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(len(indices), SMALL_MODEL["n_positions"], dtype=torch.int64)
        return rows, rows

    def read_ahead(self, indices: Any) -> None:
        pass


def program_of_model(config: RunConfig, *, rank: int, world_size: int) -> Program:
    """Returns what a rank sends and receives that computes with a real model."""
    recorder = Recorder(rank, world_size)
    with recorder.in_place_of_torch(), nothing_to_read():
        assert isinstance(config.model, GPTConfig)
        model = GPT(config.model)
        model.init_weights(0)
        group = WorkerGroup(rank, world_size)
        sharding = run_sharding(config.scaling, rank=rank, world_size=world_size)
        state = run_state(model, config.train, device=CPU, group=group, sharding=sharding)
        rows: Any = Zeros()
        gradient = step_gradient(config, state, rows, group, eot_id=None)
        gradient.of_step(1, StepTimer())
        state.apply(norm=0.0, learning_rate=0.0)
        gradient.close()
    return recorder.program


@pytest.mark.parametrize(
    ("shard", "recompute"),
    [("none", False), ("optimizer", True), ("gradients", False), ("parameters", True)],
)
def test_a_real_model_exchanges_what_one_without_memory_does(shard: Shard, recompute: bool) -> None:
    config = config_of(shard, lanes=9, model=SMALL_MODEL)
    train = config.train.model_copy(update={"recompute": recompute})
    real = program_of_model(config.model_copy(update={"train": train}), rank=1, world_size=8)
    made = program_of(config, rank=1, world_size=8)
    assert len(real.events) > 20
    assert [*map(told, real.events)] == [*map(told, made.events)]


def told(event: Event) -> tuple[object, ...]:
    if event.call is None:
        return event
    sent, received = event.call.sent.tolist(), event.call.received.tolist()
    return event.place, event.call.tag, event.call.of, sent, received


def bytes_of_step(program: Program) -> tuple[int, int]:
    """Returns what a rank sends to its own node and to others, without the figures of the step."""
    near = far = 0
    own_node = program.rank // NODE
    figures = [call for call in program.calls if call.tag is None][-1]
    for call in program.calls:
        if call is figures:
            continue
        is_near = call.sent[:, 0] // NODE == own_node
        near += int(call.sent[is_near, 1].sum())
        far += int(call.sent[~is_near, 1].sum())
    return near, far


def planned_bytes(world: World) -> tuple[list[float], Traffic]:
    """Returns what each rank sends by the planner's messages, and what the planner says of the
    busiest."""
    config = world.config
    layout = layout_of(config)
    sharding = run_sharding(config.scaling, rank=0, world_size=world.size)
    busiest = exchange(
        config, layout, OPTIONS, world_size=world.size, num_lanes=world.num_lanes, lane_s=1.0
    )
    size, num_groups = sharding.group_size, sharding.num_groups
    uniform = num_bytes(busiest.traffic)
    between = between_groups(layout, sharding, OPTIONS, num_lanes=world.num_lanes)
    uniform -= num_bytes(between)
    sums = [*team_plan([range(world.num_lanes)], subtrees(world, num_groups)).messages()]
    updated: list[Message] = []
    gathers = [*gather_messages(num_groups, teams_to_gather(num_groups))]
    if sharding.sends_sums:
        sums += gathers
    if sharding.sends_values:
        uniform -= num_bytes(between_holders(layout, sharding, OPTIONS))
        holders = sharding.num_holders
        updated += gather_messages(holders, teams_to_gather(holders))
    of_sums, of_updates = shares(sums), shares(updated)
    planned: list[float] = []
    for rank in range(world.size):
        share = of_sums[rank // size] / size + of_updates[rank % sharding.num_holders]
        planned.append(uniform + 4 * layout.size * share)
    return planned, busiest.traffic


def subtrees(world: World, num_groups: int) -> Sequence[Sequence[range]]:
    return subtrees_of_ranks(world.num_lanes, num_groups)


def shares(messages: Sequence[Message]) -> Counter[int]:
    """Returns the share of all values that each peer sends."""
    sent: Counter[int] = Counter()
    for message in messages:
        sent[message.sender] += message.share  # type: ignore[assignment]
    return sent


def num_bytes(traffic: Traffic) -> float:
    return traffic.link_bytes + traffic.card_bytes


SMALL = World("none", 4)


def with_fault(rank: int, attribute: str, fault: object) -> list[Program]:
    """Returns the programs of a small world of which one rank does something else."""
    ranks = [*programs(SMALL)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attribute, fault)
        ranks[rank] = program_of(SMALL.config, rank=rank, world_size=SMALL.size)
    return ranks


def test_a_receive_that_is_left_out_is_found() -> None:
    pass_on, num_calls = Peers.pass_on, 0

    def without_one(peers: Peers, sent: list, received: list, *, tag: int = 0) -> None:
        nonlocal num_calls
        num_calls += 1
        pass_on(peers, sent, received if num_calls != 5 else [], tag=tag)

    ranks = with_fault(2, "raymill.state.peers.Peers.pass_on", without_one)
    for wire in Wire:
        [problem, *_] = problems_of(ranks, wire)
        assert "to rank 2" in problem
        assert "messages are sent and" in problem


def test_buckets_in_another_order_are_found() -> None:
    """Also where they are equally long."""
    exchange_bucket = BucketExchange.exchange

    def swapped(of: BucketExchange, bucket: int) -> None:
        if bucket != 0:
            exchange_bucket(of, bucket)
        if bucket == 1:
            exchange_bucket(of, 0)

    ranks = with_fault(1, "raymill.sums.bucket_exchange.BucketExchange.exchange", swapped)
    for wire in Wire:
        problems = problems_of(ranks, wire)
        assert any("is of the sums of bucket 1, and" in problem for problem in problems)


def test_parts_that_are_gathered_later__fit_by_their_tag_and_not_without() -> None:
    """On a GPU the order in which calls begin is all that matches them."""
    finish, wait = HalvedSums.finish, BucketExchange.wait
    gather, waiting = BucketExchange._gather, list[tuple[Any, Any]]()

    def later(exchange: BucketExchange, bundle: object) -> None:
        waiting.append((exchange, bundle))

    def finish_first(*arguments: Any) -> None:
        finish(*arguments)
        while waiting:
            gather(*waiting.pop(0))

    def gather_the_last(exchange: BucketExchange) -> None:
        gather(*waiting.pop())
        wait(exchange)

    ranks = [*programs(SMALL)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BucketExchange, "_gather", later)
        patched.setattr(HalvedSums, "finish", finish_first)
        patched.setattr(BucketExchange, "wait", gather_the_last)
        ranks[3] = program_of(SMALL.config, rank=3, world_size=SMALL.size)
    assert problems_of(ranks, Wire.GLOO) == []
    [first, *_] = problems_of(ranks, Wire.NCCL)
    assert "is of values from" in first


def test_two_threads_that_share_a_tag_are_found() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raymill.sums.bucket_exchange.GATHER_TAG", 0)
        ranks = programs_of(SMALL.config, SMALL.size)
    problems = problems_of(ranks, Wire.GLOO)
    assert any("gathers and sums exchange at a time with tag 0" in one for one in problems)
    assert problems_of(ranks, Wire.NCCL) == []


@pytest.mark.parametrize("wire", Wire)
def test_messages_of_a_call_must_be_under_way_together(wire: Wire) -> None:
    """The exchange needs it: two that swap halves would each send first, and wait for the other to
    receive. That is why a call is one `batch_isend_irecv`."""
    problems = problems_of([one_by_one(program) for program in programs(SMALL)], wire)
    assert problems and problems[-1].startswith("wait for one another: ")


def test_a_figure_that_one_rank_does_not_give_is_found() -> None:
    ranks = [*programs(SMALL)]
    kept = [event for event in ranks[0].events if event.call is None or event.call.tag is not None]
    ranks[0] = replace(ranks[0], events=kept)
    assert problems_of(ranks, Wire.NCCL) == ["call 0 of all ranks is made by 3 of 4"]


def test_bytes_that_a_rank_sends_twice_are_counted() -> None:
    planned, _ = planned_bytes(SMALL)
    [first, *_] = programs(SMALL)
    twice = replace(first, events=[*first.events, *first.events])
    assert sum(bytes_of_step(first)) == pytest.approx(planned[0], rel=0.01)
    assert sum(bytes_of_step(twice)) > 1.9 * planned[0]
    assert np.array_equal(first.calls[0].sent, twice.calls[0].sent)
