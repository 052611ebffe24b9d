"""A training state through a keeper's memory and back: the same bits, of the right run only, within its bounds."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import jobs.snapshots.keepers
import jobs.snapshots.snapshots
import jobs.training.attempt
from cluster.settings.run import TrainConfig
from jobs.exact.train_state import TrainState
from jobs.run.ledger import Ledger
from jobs.snapshots.choice import Holding, Snapshot, choose
from jobs.snapshots.keepers import ANSWER_S, CHUNK_BYTES, Keeper
from jobs.snapshots.slots import Header, Slots
from jobs.snapshots.snapshots import Snapshots, state_part
from jobs.training.train_loop import train
from jobs.workers.worker_group import WorkerGroup
from model.checkpoint import parameter_hash
from tests.jobs.runs import tiny_plan
from tests.jobs.train_states import RATE, apply, gradients, make_model

SIZE = 12 << 12


def make_memory(*, max_bytes: int = 1 << 30) -> Keeper:
    return Keeper(node="a", max_bytes=max_bytes)


def header_of(state: TrainState | None = None, *, step: int = 1, attempt: int = 1) -> Header:
    return Header(
        attempt=attempt,
        step=step,
        rank=0,
        world_size=1,
        num_updates=state.num_updates if state else step,
        names=list(state.own_state().tensors) if state else ["values"],
        carried={},
    )


def whole(memory: Keeper) -> list[Holding]:
    return [held for held in memory.holdings() if memory.is_whole(held)]


def opened(memory: Keeper, area: str, num_bytes: int = SIZE) -> Slots:
    """Maps the memory as a worker in another process would."""
    path = memory.open(area, num_bytes)
    assert path is not None
    return Slots.at(path)


def write(slots: Slots, header: Header) -> None:
    slots.write(header, [np.full(SIZE, header.step % 251, np.uint8)])


def test_a_state_comes_back_with_the_same_bits_and_trains_on_alike() -> None:
    state = TrainState(make_model(), TrainConfig(), device=torch.device("cpu"))
    for gradient in gradients(state, 3):
        apply(state, gradient, learning_rate=RATE)
    memory = make_memory()
    arrays = [tensor.numpy().view(np.uint8) for tensor in state.own_state().tensors.values()]
    opened(memory, "state", sum(array.size for array in arrays)).write(header_of(state, step=3), arrays)

    (held,) = whole(memory)
    assert (held.node, held.area, held.header.step) == ("a", "state", 3)
    header, data = held.header, memory.chunk(held, 0)
    assert data is not None
    assert header.num_bytes < CHUNK_BYTES
    other = TrainState(make_model(), TrainConfig(), device=torch.device("cpu"))
    other.load_state([state_part(header, data[: header.num_bytes])])
    assert other.num_updates == 3
    for gradient in gradients(state, 2):
        apply(state, gradient, learning_rate=RATE)
        apply(other, gradient, learning_rate=RATE)
    assert parameter_hash(other.model.state_dict()) == parameter_hash(state.model.state_dict())


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
    """A keeper that has 1.3 billion parameters to read, and so takes longer than an answer without reading may."""

    def is_whole(self, held: Holding) -> bool:
        time.sleep(ANSWER_S + 0.5)
        return super().is_whole(held)


@pytest.mark.cluster
def test_a_large_state_has_the_time_to_be_read_and_a_damaged_one_is_named(
    ray_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both slots were read within 2 s or the keeper was left out, so a large run silently had no snapshots."""
    keeper = ray.remote(num_cpus=0)(LargeKeeper).remote(node="a", max_bytes=1 << 30)
    slots = Slots.at(ray.get(keeper.open.remote("state", SIZE)))
    write(slots, header_of(step=6))
    slots.data(slots.write(header_of(step=7), [np.full(SIZE, 7, np.uint8)]))[17] ^= 1
    monkeypatch.setattr(jobs.snapshots.keepers, "READ_BYTES_PER_S", SIZE / 20)
    monkeypatch.setattr(jobs.snapshots.snapshots, "find_keepers", lambda launch: {"a": keeper})
    snapshots = Snapshots(None, WorkerGroup(0, 1))
    snapshots._launch = "this process"
    found = snapshots.newest(explained_step=9, at_least=0, is_left_out=lambda step: False)
    assert found is not None and found.header.step == 6
    assert "the snapshot of step 7 on node a is damaged" in capsys.readouterr().err


def test_what_was_written_again_is_not_given_out_for_the_old() -> None:
    memory = make_memory()
    slots = opened(memory, "state")
    write(slots, header_of(step=1))
    (held,) = memory.holdings()
    write(slots, header_of(step=2))
    assert memory.chunk(held, 0) is not None
    write(slots, header_of(step=3))  # over step 1
    assert not memory.is_whole(held)
    assert memory.chunk(held, 0) is None
    assert memory.chunk(replace(held, area="gone"), 0) is None


def test_memory_is_bounded_kept_and_given_back() -> None:
    memory = make_memory(max_bytes=3 * Slots.bytes_needed(SIZE) - 1)
    write(opened(memory, "state"), header_of(step=4, attempt=1))
    write(opened(memory, "copy-state"), header_of(step=4, attempt=2))
    assert memory.open("third", SIZE) is None
    assert [held.header.step for held in whole(memory)] == [4, 4]
    write(opened(memory, "state"), header_of(step=5, attempt=2))  # the next group takes the same memory
    assert sorted(held.header.step for held in whole(memory) if held.area == "state") == [4, 5]
    memory.close_older(2)
    assert len(whole(memory)) == 3
    memory.close_older(3)
    assert whole(memory) == []
    assert memory.open("third", SIZE) is not None


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
    raise_after: dict[int, Exception]  # by step
    every_steps = 1

    def __init__(self, launch: str | None, group: WorkerGroup) -> None:
        super().__init__(launch, group)
        self._launch = "this process"

    def _write(self, step: int, state: TrainState, *, attempt: int, carried: dict[str, Any]) -> None:
        arrays = [tensor.numpy().view(np.uint8) for tensor in state.own_state().tensors.values()]
        header = replace(header_of(state, step=step, attempt=attempt), carried=carried)
        opened(self.memory, "state", sum(array.size for array in arrays)).write(header, arrays)

    def newest(self, *, explained_step: int, at_least: int, is_left_out: Callable[[int], bool]) -> Snapshot | None:
        return choose(
            whole(self.memory),
            explained_step=explained_step,
            at_least=at_least,
            is_left_out=is_left_out,
        )

    def restore(self, snapshot: Snapshot, state: TrainState) -> dict[str, Any]:
        ((held,),) = snapshot.shares
        data = self.memory.chunk(held, 0)
        assert data is not None
        state.load_state([state_part(held.header, data[: held.header.num_bytes])])
        return held.header.carried

    def after_step(self, step: int, state: TrainState, *, attempt: int, carried: dict[str, Any]) -> None:
        self._whole = (step, attempt, carried, state.num_updates)
        if step % self.every_steps == 0:
            self._write(step, state, attempt=attempt, carried=carried)
        if step in self.raise_after:
            raise self.raise_after.pop(step)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("every_steps", "error"), [(1, KilledError()), (4, RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed"))]
)
def test_a_run_that_continues_from_memory_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, every_steps: int, error: Exception
) -> None:
    """One worker, killed right after the snapshots of steps 2 and 7, between which a checkpoint comes; or one that
    loses another then, with no snapshot due."""
    monkeypatch.setattr(OwnMemory, "memory", make_memory(), raising=False)
    monkeypatch.setattr(OwnMemory, "raise_after", {2: error, 7: error}, raising=False)
    monkeypatch.setattr(OwnMemory, "every_steps", every_steps)
    shape = {"preset": "tiny", "n_positions": 48, "vocab_size": 300, "dropout": dropout}
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"), model=shape)
    train(undisturbed, rank=0, world_size=1)
    monkeypatch.setattr(jobs.training.attempt, "Snapshots", OwnMemory)
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
    assert [line["loss"] for line in ledgers[0].steps] == [line["loss"] for line in ledgers[1].steps]
