"""A training state through a keeper's memory and back: the same bits, of the right run only, within
its bounds."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray

import jobs.snapshots.keepers
import jobs.snapshots.snapshots
import jobs.training.open_attempt
import raymill.state.train_state
from jobs.exact.stored_state import DamagedStateError
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name
from jobs.run.ledger import Ledger
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.snapshots.choice import (
    COPIES,
    Holding,
    Snapshot,
    choose,
    contradictions,
    num_slots,
    sharded_area,
)
from jobs.snapshots.keepers import ANSWER_S, AS_ACTOR, Keeper, NoRoom, copy_to_second_nodes
from jobs.snapshots.slots import Bytes, Header, Slots
from jobs.snapshots.snapshots import Share, Snapshots
from jobs.training.rank_phases import RankPhases
from jobs.training.train_loop import train
from jobs.training.validation import Validator
from jobs.workers.preemption import Notices
from raymill.files.safetensors_file import parameter_hash
from raymill.state.host_copies import HostCopies
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan
from tests.jobs.train_states import RATE, apply, gradients, make_state
from tests.waiting import wait_until

SIZE = 12 << 12


def make_memory(*, max_bytes: int = 1 << 30) -> Keeper:
    return Keeper(node="a", max_bytes=max_bytes)


def header_of(*, step: int = 1, attempt: int = 1) -> Header:
    return Header(
        attempt, step, rank=0, world_size=1, num_updates=step, names=["values"], carried={}
    )


def whole(memory: Keeper) -> list[Holding]:
    return [held for held in memory.holdings() if memory.is_whole(held)]


def opened(memory: Keeper, area: str, num_bytes: int = SIZE, *, attempt: int = 1) -> Slots:
    """Maps the memory as a worker in another process would."""
    path = memory.open(area, num_bytes, attempt)
    assert isinstance(path, str)
    return Slots.at(path)


def write(slots: Slots, header: Header) -> None:
    slots.write(header, [np.full(SIZE, header.step % 251, np.uint8)])


def test_a_damaged_one_is_held_and_known_to_be_damaged() -> None:
    memory = make_memory()
    slots = opened(memory, "state")
    assert memory.holdings() == []
    write(slots, header_of(step=6))
    assert [held.header.step for held in whole(memory)] == [6]
    slots.data(0)[17] ^= 1
    assert [held.header.step for held in memory.holdings()] == [6]
    assert whole(memory) == []


class LargeKeeper(Keeper):
    """A keeper that has 1.3 billion parameters to read, and so takes longer than an answer without
    reading may."""

    def is_whole(self, held: Holding) -> bool:
        time.sleep(ANSWER_S + 0.5)
        return super().is_whole(held)


@pytest.mark.cluster
def test_a_large_state_has_the_time_to_be_read_and_a_damaged_one_is_named(
    ray_workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both slots were read within 2 s or the keeper was left out, so a large run silently had no
    snapshots."""
    keeper = ray.remote(**AS_ACTOR)(LargeKeeper).remote(node="a", max_bytes=1 << 30)
    slots = Slots.at(ray.get(keeper.open.remote("state", SIZE, 1)))
    write(slots, header_of(step=6))
    write(slots, header_of(step=7))
    slots.data(1)[17] ^= 1
    monkeypatch.setattr(jobs.snapshots.keepers, "READ_BYTES_PER_S", SIZE / 20)
    monkeypatch.setattr(jobs.snapshots.snapshots, "find_keepers", lambda launch: {"a": keeper})
    snapshots = Snapshots(None, WorkerGroup(0, 1))
    snapshots._launch = "this process"
    found = snapshots.newest(
        explained_step=9, at_least=0, is_left_out=lambda step: False, after_attempt=0
    )
    assert found is not None and found.header.step == 6
    assert "the snapshot of step 7 on node a is damaged" in capsys.readouterr().err


def test_what_was_written_again_is_not_given_out_for_the_old() -> None:
    memory = make_memory()
    slots = opened(memory, "state")
    write(slots, header_of(step=1))
    (held,) = memory.holdings()
    write(slots, header_of(step=2))
    assert memory.chunk(held, 0, 8) is not None
    write(slots, header_of(step=3))  # over step 1
    assert not memory.is_whole(held)
    assert memory.chunk(held, 0, 8) is None
    assert memory.chunk(replace(held, area="gone"), 0, 8) is None


def test_what_is_copied_to_another_node_stays_while_newer_ones_are_written() -> None:
    memory = make_memory()
    slots = opened(memory, "state")
    write(slots, header_of(step=1))
    (held,) = memory.holdings()
    memory.pin(held, 60.0)
    for step in range(2, 6):
        write(slots, header_of(step=step))
    assert sorted(held.header.step for held in whole(memory)) == [1, 5]
    memory.pin(held, 0.0)
    write(slots, header_of(step=6))
    write(slots, header_of(step=7))
    assert sorted(held.header.step for held in whole(memory)) == [6, 7]
    for held in memory.holdings():  # more than can be: training goes on
        memory.pin(held, 60.0)
    write(slots, header_of(step=8))
    assert sorted(held.header.step for held in whole(memory)) == [7, 8]


@pytest.mark.cluster
def test_a_share_is_copied_from_keeper_to_keeper_and_a_lack_of_room_is_reported(
    ray_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    num_bytes = 12 * state.layout.size
    room = {
        "a": Slots.bytes_needed(num_bytes),
        "b": Slots.bytes_needed(num_bytes) - 1,
        "c": 1 << 30,
    }
    keepers = {
        node: ray.remote(**AS_ACTOR)(Keeper).remote(node=node, max_bytes=room[node])
        for node in room
    }
    ray.get([keeper.holdings.remote() for keeper in keepers.values()])  # they are there
    monkeypatch.setattr(jobs.snapshots.snapshots, "find_keepers", lambda launch: keepers)
    reasons = {}
    for node in "ab":
        snapshots = Snapshots(None, WorkerGroup(0, 1))
        snapshots._launch, snapshots._node, snapshots._node_of_rank = "this process", node, [node]
        reasons[node] = [
            snapshots.after_step(step, state, attempt=1, carried={}) for step in (1, 2, 3)
        ]
    assert reasons["a"] == [None, None, None]
    assert reasons["b"][1:] == [None, None]
    assert "node b allows 0.0 GB for them (checkpoint.snapshot_bytes" in reasons["b"][0]
    newest = max(ray.get(keepers["a"].holdings.remote()), key=lambda held: held.header.step)
    for node in "bc":
        ray.get(keepers[node].copy.remote(newest, keepers["a"]))
    assert ray.get(keepers["b"].holdings.remote()) == []
    (copied,) = ray.get(keepers["c"].holdings.remote())
    assert copied.area == COPIES + newest.area
    assert copied.header.checksum == newest.header.checksum
    assert ray.get(keepers["c"].is_whole.remote(copied))
    gone = replace(newest, header=replace(newest.header, step=9, sequence=99))
    ray.get(keepers["c"].copy.remote(gone, keepers["a"]))
    assert ray.get(keepers["c"].holdings.remote()) == [copied], (
        "what is lost on its way is not kept"
    )


@pytest.mark.cluster
def test_shares_that_are_written_all_the_time_are_copied_of_one_step(ray_workers: int) -> None:
    """Two ranks of a sharded state write every 20 ms; while they do, their nodes' keepers copy from
    each other, and what is left of one step after the loss of any node is whole."""
    nodes = ["a", "b"]
    keepers = {
        node: ray.remote(**AS_ACTOR)(Keeper).remote(node=node, max_bytes=1 << 30) for node in nodes
    }
    areas = {node: sharded_area(rank, 2, nodes) for rank, node in enumerate(nodes)}
    slots = {
        node: Slots.at(ray.get(keepers[node].open.remote(areas[node], SIZE, 1)), 3)
        for node in nodes
    }
    assert {num_slots(area) for area in areas.values()} == {3}
    ended = threading.Event()
    taken: list[int] = []

    def train() -> None:
        for step in itertools.count(1):
            for rank, node in enumerate(nodes):
                write(slots[node], replace(header_of(step=step), rank=rank, world_size=2))
            taken.append(step)
            if ended.wait(0.02):
                return

    def wait_for_step(step: int) -> None:
        wait_until(lambda: len(taken) >= step, poll_s=0.01)

    def listed() -> list[Holding]:
        return [held for keeper in keepers.values() for held in ray.get(keeper.holdings.remote())]

    thread = threading.Thread(target=train)
    thread.start()
    try:
        steps, kept = set(), []
        for _ in range(3):
            before = kept
            while kept is before:
                kept = copy_to_second_nodes(keepers, listed(), nodes, before)
            wait_for_step(len(taken) + 10)
            copied = [held for held in listed() if held.area.startswith(COPIES)]
            assert {(held.node, held.area) for held in copied} == {
                ("a", COPIES + areas["b"]),
                ("b", COPIES + areas["a"]),
            }
            assert all(ray.get(keepers[held.node].is_whole.remote(held)) for held in copied)
            for lost in nodes:  # whichever node is lost, the other has a whole state
                left = [held for held in listed() if held.node != lost]
                found = choose(
                    left, explained_step=10**9, at_least=0, is_left_out=lambda step: False
                )
                assert found is not None
                steps.add(found.header.step)
            assert {held.header.step for held in kept} <= steps
        assert len(steps) == 3
    finally:
        ended.set()
        thread.join()


def test_memory_is_bounded_kept_and_given_back() -> None:
    memory = make_memory(max_bytes=3 * Slots.bytes_needed(SIZE) - 1)
    write(opened(memory, "state"), header_of(step=4, attempt=1))
    write(opened(memory, "copy-state"), header_of(step=4, attempt=2))
    assert isinstance(memory.open("third", SIZE, 1), NoRoom)
    assert [held.header.step for held in whole(memory)] == [4, 4]
    # The next group takes the same memory
    write(opened(memory, "state"), header_of(step=5, attempt=2))
    assert sorted(held.header.step for held in whole(memory) if held.area == "state") == [4, 5]
    memory.close_older(2)
    assert len(whole(memory)) == 3
    memory.close_older(3)
    assert whole(memory) == []
    assert isinstance(memory.open("third", SIZE, 3), str)


def test_areas_of_older_attempts_are_freed_for_want_of_room_alone_the_oldest_first() -> None:
    memory = make_memory(max_bytes=4 * Slots.bytes_needed(SIZE))
    for attempt in (1, 2, 3):
        write(opened(memory, f"of-{attempt}", attempt=attempt), header_of(attempt=attempt))
    opened(memory, "never-written", attempt=1)

    def areas() -> list[str]:
        return sorted(memory._areas)

    assert isinstance(memory.open("too-large", 50 * SIZE, 9), NoRoom)
    assert areas() == ["never-written", "of-1", "of-2", "of-3"], (
        "what would make no room is not freed"
    )
    opened(memory, "next", attempt=3)
    assert areas() == ["next", "of-1", "of-2", "of-3"]
    opened(memory, "another", attempt=3)
    opened(memory, "a-third", attempt=3)
    assert areas() == ["a-third", "another", "next", "of-3"]
    assert isinstance(memory.open("a-fourth", SIZE, 3), NoRoom), (
        "an attempt frees nothing of its own"
    )


class OneKeeper(Snapshots):
    """Snapshots with a keeper that has an actor of its own, and belongs to no launch."""

    keeper: ClassVar[Any]

    def __init__(self, launch: str | None, group: WorkerGroup) -> None:
        super().__init__(None, group)
        self._launch, self._node, self._node_of_rank = "this process", "a", ["a"]


@pytest.fixture
def keeper_with_room(
    ray_workers: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[int], Any]:
    """Starts the keeper of `OneKeeper`, with so many bytes."""

    def started(max_bytes: int) -> Any:
        keeper = ray.remote(**AS_ACTOR)(Keeper).remote(node="a", max_bytes=max_bytes)
        ray.get(keeper.holdings.remote())  # it is there
        request.addfinalizer(lambda: ray.kill(keeper))
        monkeypatch.setattr(jobs.snapshots.snapshots, "find_keepers", lambda launch: {"a": keeper})
        return keeper

    return started


def steps_held(keeper: Any) -> list[tuple[int, int]]:
    """Returns the attempt and the step of all that is held."""
    return sorted(
        (held.header.attempt, held.header.step) for held in ray.get(keeper.holdings.remote())
    )


@pytest.mark.cluster
def test_where_one_set_has_room_the_first_step_after_a_resize_takes_the_place_of_what_it_began_from(
    keeper_with_room: Callable[[int], Any],
) -> None:
    """Two of four workers had their shares on this node; a worker of the new group has another
    share, of the same size."""
    state = make_state()
    num_bytes = 12 * state.layout.size
    quarter = np.zeros(num_bytes // 4 // 8 * 8, np.uint8)
    keeper = keeper_with_room(
        max(Slots.bytes_needed(num_bytes), 2 * Slots.bytes_needed(quarter.nbytes))
    )
    for rank in range(2):
        path = ray.get(keeper.open.remote(f"group-0-rank-{rank}-of-4", quarter.nbytes, 1))
        Slots.at(path).write(replace(header_of(step=100), rank=rank, world_size=4), [quarter])
    snapshots = OneKeeper(None, WorkerGroup(0, 1))
    news = []
    for step in range(101, 105):
        news.append(snapshots.after_step(step, state, attempt=2, carried={}))
        assert (2, step) in steps_held(keeper)
    assert news == [None] * 4


@pytest.mark.cluster
def test_the_ledger_has_when_snapshots_end_and_begin_and_until_then_the_older_set_stays(
    keeper_with_room: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the run takes 1.2 MB. Another user's area leaves 0.7 MB of the memory, until step
    6."""
    keeper = keeper_with_room(4_000_000)
    path = ray.get(keeper.open.remote("older", SIZE, 0))
    write(Slots.at(path), replace(header_of(attempt=0), carried={"line": None}))
    assert isinstance(ray.get(keeper.open.remote("another user's", 1_500_000, 99)), str)
    held_before = {}

    class Freed(OneKeeper):
        def after_step(self, step: int, state: TrainState, **more: Any) -> str | None:
            held_before[step] = steps_held(keeper)
            if step == 6:
                ray.get(keeper.close_older.remote(100))
            return super().after_step(step, state, **more)

    monkeypatch.setattr(jobs.training.open_attempt, "Snapshots", Freed)
    monkeypatch.setattr(jobs.snapshots.snapshots, "_RETRY_S", 0.0)
    plan = tiny_plan(str(tmp_path), num_steps=10)
    train(plan, rank=0, world_size=1)
    events = Ledger.read(plan.run).events("snapshots_off", "snapshots_on")
    assert [(event["event"], event["step"]) for event in events] == [
        ("snapshots_off", 1),
        ("snapshots_on", 8),
    ]
    assert "one more share takes 0.0 GB" in events[0]["reason"]
    assert held_before[6] == [(0, 1)]
    assert held_before[8] == [(1, 6), (1, 7)]


def test_the_memory_has_no_name_in_a_file_system() -> None:
    before = set(Path("/dev/shm").iterdir())
    memory = make_memory()
    write(opened(memory, "state"), header_of())
    assert set(Path("/dev/shm").iterdir()) == before


def test_another_size_starts_afresh() -> None:
    memory = make_memory()
    write(opened(memory, "state"), header_of())
    opened(memory, "state", 2 * SIZE)
    assert memory.holdings() == []


class KilledError(Exception):
    """Stands in for a SIGKILL."""


class OwnMemory(Snapshots):
    """Snapshots whose keeper is this process."""

    memory: Keeper
    raise_after: ClassVar[dict[int, Exception]] = {}  # by step
    every_steps = 1

    def __init__(
        self, launch: str | None, group: WorkerGroup, *, memory: Keeper | None = None
    ) -> None:
        super().__init__(None, WorkerGroup(0, 1))
        self._launch, self._group = "this process", group
        self._node, self._node_of_rank = "a", ["a"] * group.world_size
        self._interval = self.every_steps
        self.memory = memory or self.memory

    def _opened(self, shares: Sequence[Share], attempt: int) -> bool:
        for share in shares:
            if share.area not in self._memory:
                path = self.memory.open(share.area, share.num_bytes, attempt)
                assert isinstance(path, str)
                self._memory[share.area] = (path, Slots.at(path))
        return True

    def _agree(self, attempt: int) -> None:
        return None

    def newest(
        self,
        *,
        explained_step: int = 100,
        at_least: int = 0,
        is_left_out: Callable[[int], bool] = lambda step: False,
        after_attempt: int = 0,
    ) -> Snapshot | None:
        held = whole(self.memory)
        return choose(
            held,
            explained_step=explained_step,
            at_least=at_least,
            is_left_out=is_left_out,
            after_attempt=after_attempt,
        )

    def contradictions(self, *, after_attempt: int) -> list[Holding]:
        return contradictions(whole(self.memory), after_attempt=after_attempt)

    def _read(self, held: Holding, spans: list[range]) -> Iterator[Bytes]:
        for span in spans:
            data = self.memory.chunk(held, span.start, span.stop)
            assert data is not None
            yield data

    def after_step(self, step: int, state: TrainState, **more: Any) -> None:
        super().after_step(step, state, **more)
        if step in self.raise_after:
            raise self.raise_after.pop(step)


@pytest.mark.parametrize("beside", [False, True])
def test_a_state_comes_back_with_the_same_bits_and_trains_on_alike(beside: bool) -> None:
    state, other = make_state(), make_state()
    state.copies = HostCopies(state.device, beside=beside)
    snapshots = OwnMemory(None, WorkerGroup(0, 1), memory=make_memory())
    for step, gradient in enumerate(gradients(state, 3), start=1):
        apply(state, gradient, learning_rate=RATE)
        snapshots.after_step(step, state, attempt=1, carried={"of": step})
    state.copies.close()
    (held,) = [held for held in whole(snapshots.memory) if held.header.step == 3]
    snapshot = snapshots.newest()
    assert snapshot is not None
    assert snapshot.shares == [[held]]
    assert snapshots.restore(snapshot, other) == {"of": 3}
    assert other.num_updates == 3
    state.copies = HostCopies(state.device)
    for gradient in gradients(state, 2):
        apply(state, gradient, learning_rate=RATE)
        apply(other, gradient, learning_rate=RATE)
    assert parameter_hash(other.model.state_dict()) == parameter_hash(state.model.state_dict())


@pytest.mark.parametrize("is_always", [False, True])
def test_a_part_that_is_altered_on_its_way_is_loaded_again(is_always: bool) -> None:
    """In a received part, which the keeper's own checksum does not see."""
    state, other = make_state(), make_state()
    snapshots = OwnMemory(None, WorkerGroup(0, 1), memory=make_memory())
    [gradient] = gradients(state, 1)
    apply(state, gradient, learning_rate=RATE)
    snapshots.after_step(1, state, attempt=1, carried={})
    snapshot = snapshots.newest()
    assert snapshot is not None
    read, altered = snapshots._read, []

    def altering(held: Holding, spans: list[range]) -> Iterator[Bytes]:
        for number, data in enumerate(read(held, spans)):
            received = data.copy()
            if number == 0 and (is_always or not altered):
                altered.append(held)
                received[40] ^= 16
            yield received

    snapshots._read = altering  # type: ignore[method-assign]
    if is_always:
        with pytest.raises(DamagedStateError, match="rank 0 loaded from the snapshot of step 1"):
            snapshots.restore(snapshot, other)
        return
    snapshots.restore(snapshot, other)
    assert altered
    assert parameter_hash(other.model.state_dict()) == parameter_hash(state.model.state_dict())


def test_the_workers_of_a_node_write_a_state_together_and_in_a_rescue_each_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 dies after its update and before it has written: rank 1 has the same state."""
    monkeypatch.setattr(jobs.snapshots.snapshots, "NUM_SHARES", {"cpu": 3})
    memory = make_memory()
    ranks = [OwnMemory(None, WorkerGroup(rank, 2), memory=memory) for rank in range(2)]
    state, other = make_state(), make_state()
    first, second = gradients(state, 2)
    apply(state, first, learning_rate=RATE)
    for rank in ranks:
        rank.after_step(1, state, attempt=1, carried={})
    assert {held.area: held.header.step for held in whole(memory)} == {
        f"share-{share}-of-3": 1 for share in range(3)
    }
    apply(state, second, learning_rate=RATE)
    ranks[1].after_step(2, state, attempt=1, carried={})
    assert sorted(held.area for held in whole(memory) if held.header.step == 2) == ["share-1-of-3"]
    before = ranks[1].newest()
    assert before is not None and before.header.step == 1
    ranks[1].rescue(state)
    after = ranks[1].newest()
    assert after is not None and after.header.step == 2
    OwnMemory(None, WorkerGroup(0, 1), memory=memory).restore(after, other)
    assert parameter_hash(other.model.state_dict()) == parameter_hash(state.model.state_dict())
    ranks[1].rescue(state)
    assert len(whole(memory)) == 6, "both steps are still there"


@pytest.mark.more
@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (Notices, "answer", 6),
        (RankPhases, "close_window", 10),
        (CheckpointWriter, "save", 9),
        (Validator, "validate", 8),
    ],
)
def test_a_step_with_a_line_is_kept_wherever_another_worker_is_lost(
    owner: type, name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls are those in which a worker waits for others, or takes long, between an update and
    the next exchange. Snapshots are due every fourth step."""
    monkeypatch.setattr(OwnMemory, "memory", make_memory(), raising=False)
    monkeypatch.setattr(OwnMemory, "every_steps", 4)
    monkeypatch.setattr(jobs.training.open_attempt, "Snapshots", OwnMemory)
    plan = tiny_plan(str(tmp_path), num_steps=12)
    call = getattr(owner, name)

    def lost(self: Any, *arguments: Any, **settings: Any) -> Any:
        lines = Ledger.read(plan.run).steps
        reached = lines[-1]["step"] if lines else 0
        if reached + (name == "validate") == step and not lost_at:
            lost_at.append(reached)
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        return call(self, *arguments, **settings)

    lost_at: list[int] = []
    monkeypatch.setattr(owner, name, lost)
    with pytest.raises(RuntimeError, match="Connection closed"):
        train(plan, rank=0, world_size=1)
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    assert [(start["step"], start["from_memory"]) for start in ledger.events("start")] == [
        (0, False),
        (lost_at[0], True),
    ]
    assert [recovery.lost_steps for recovery in ledger.recoveries()] == [0]


def test_a_run_that_continues_from_memory_clears_what_the_lost_attempt_left_in_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of 1.3B parameters takes 16 GB there."""
    monkeypatch.setattr(OwnMemory, "memory", make_memory(), raising=False)
    monkeypatch.setattr(OwnMemory, "raise_after", {7: KilledError()}, raising=False)
    monkeypatch.setattr(jobs.training.open_attempt, "Snapshots", OwnMemory)
    plan = tiny_plan(str(tmp_path))
    with pytest.raises(KilledError):
        train(plan, rank=0, world_size=1)
    checkpoints = RunCheckpoints(plan.run)
    left = checkpoints.spool / checkpoint_name(6, 1)
    left.mkdir(parents=True, exist_ok=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    train(plan, rank=0, world_size=1)
    assert [start["from_memory"] for start in Ledger.read(plan.run).events("start")] == [
        False,
        True,
    ]
    assert list(checkpoints.spool.glob("*step-*")) == []


@pytest.mark.more
@pytest.mark.parametrize(("dropout", "beside"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize(
    ("every_steps", "error"),
    [(1, KilledError()), (4, RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed"))],
)
def test_a_run_that_continues_from_memory_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    beside: bool,
    every_steps: int,
    error: Exception,
) -> None:
    """One worker, killed right after the snapshots of steps 2 and 7, between which a checkpoint
    comes; or one that loses another then, with no snapshot due."""
    monkeypatch.setattr(raymill.state.train_state, "HostCopies", partial(HostCopies, beside=beside))
    monkeypatch.setattr(OwnMemory, "memory", make_memory(), raising=False)
    monkeypatch.setattr(OwnMemory, "raise_after", {2: error, 7: error}, raising=False)
    monkeypatch.setattr(OwnMemory, "every_steps", every_steps)
    shape = {"preset": "tiny", "n_positions": 48, "vocab_size": 300, "dropout": dropout}
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"), model=shape)
    train(undisturbed, rank=0, world_size=1)
    monkeypatch.setattr(jobs.training.open_attempt, "Snapshots", OwnMemory)
    disturbed = tiny_plan(str(tmp_path / "disturbed"), model=shape)
    for _ in range(2):
        with pytest.raises(type(error)):
            train(disturbed, rank=0, world_size=1)
    train(disturbed, rank=0, world_size=1)

    ledgers = [Ledger.read(plan.run) for plan in (undisturbed, disturbed)]
    assert [(start["step"], start["from_memory"]) for start in ledgers[1].events("start")] == [
        (0, False),
        (2, True),
        (7, True),
    ]
    assert [recovery.lost_steps for recovery in ledgers[1].recoveries()] == [0, 0]
    hashes = [ledger.events("checkpoint")[-1]["parameter_hash"] for ledger in ledgers]
    assert hashes[0] == hashes[1]
    assert [line["loss"] for line in ledgers[0].steps] == [
        line["loss"] for line in ledgers[1].steps
    ]


def test_where_two_nodes_hold_other_bits_of_one_step_the_run_goes_back_to_what_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's state was wrong, so its copy has a valid checksum. An audit has proven the steps
    up to 4, a checkpoint of step 6 may be wrong as well."""
    settings: dict[str, Any] = {
        "num_steps": 12,
        "train": {"audit_every_steps": 5},
        "checkpoint": {"save_every_steps": 2, "num_to_keep": 9},
    }
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"), **settings)
    train(undisturbed, rank=0, world_size=1)
    memory = make_memory()
    monkeypatch.setattr(OwnMemory, "memory", memory, raising=False)
    monkeypatch.setattr(OwnMemory, "raise_after", {7: KilledError()}, raising=False)
    monkeypatch.setattr(jobs.training.open_attempt, "Snapshots", OwnMemory)
    plan = tiny_plan(str(tmp_path / "disturbed"), **settings)
    with pytest.raises(KilledError):
        train(plan, rank=0, world_size=1)
    newest = max(whole(memory), key=lambda held: held.header.step)
    data = memory.chunk(newest, 0, newest.header.num_bytes)
    assert data is not None
    other = data.copy()
    other[40] ^= 16
    slots = opened(memory, "of-another-node", newest.header.num_bytes)
    slots.write(replace(newest.header, checksum=None), [other])
    train(plan, rank=0, world_size=1)

    ledgers = [Ledger.read(each.run) for each in (undisturbed, plan)]
    [undecided] = ledgers[1].events("undecided")
    assert (undecided["what"], undecided["step"]) == ("snapshots", 8)
    # Step 4, unless those up to it were still waiting to be stored when others took their place
    proven = undecided["to_step"]
    assert proven in (0, 2, 4)
    assert len({*undecided["shown"].values()}) == 2
    start = ledgers[1].events("start")[-1]
    assert (start["step"], start["from_memory"]) == (proven, False)
    assert [line["proven_to"] for line in ledgers[1].steps[-3:]] == [9, 9, 9]
    assert not any("not_proven_since" in line for line in ledgers[1].steps)
    hashes = [ledger.events("checkpoint")[-1]["parameter_hash"] for ledger in ledgers]
    assert hashes[0] == hashes[1]
