"""Each worker's own thread stores its shard: all of them the same steps, of values that are finite,
in no more memory."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.settings.run import CheckpointConfig
from cluster.settings.train import TrainConfig
from cluster.storage.uris import open_storage
from jobs.exact.run_state import run_state
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name
from jobs.run.ledger import Ledger, LedgerWriter
from jobs.run.sharded_checkpoints import ShardedCheckpoint
from jobs.run.writer_generation import Fence
from jobs.saving import shard_writer
from jobs.saving.publisher import Publisher
from jobs.saving.shard_writer import Shard, ShardWriter
from jobs.training.train_loop import train
from model.config import GPTConfig, preset_fields
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import TRAIN_STATE, WEIGHTS, shard_of, verify_checkpoint
from model.gpt import GPT, initial_weights
from model.text.tokenizer import train_bpe
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.adamw import AdamW
from raymill.state.state_shares import StateShares
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup
from tests.checkpoints import metadata_of
from tests.jobs.new_memory import NewMemory
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds
from tests.jobs.shardings import sharding
from tests.waiting import wait_until

TOKENIZER = train_bpe(["to be or not to be"], vocab_size=257)
CPU = torch.device("cpu")
NUM_RANKS = 2


@dataclass(frozen=True)
class Together(WorkerGroup):
    """Ranks in threads of one process."""

    barrier: Any = None
    values: list[Any] = field(default_factory=list, compare=False)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(30)
        found = list(self.values)
        self.barrier.wait(30)
        return found


@pytest.fixture(params=["optimizer", "gradients", "parameters"])
def states(request: pytest.FixtureRequest) -> Iterator[list[TrainState]]:
    """Two ranks' states, whose shards make the initial weights."""
    config = GPTConfig(**preset_fields({"preset": "tiny", "vocab_size": TOKENIZER.vocab_size}))
    found, barrier, values = [], threading.Barrier(NUM_RANKS), [None] * NUM_RANKS
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    for rank in range(NUM_RANKS):
        with torch.device("meta"):
            model = GPT(config)
        group = Together(rank, NUM_RANKS, barrier=barrier, values=values)
        divided = sharding(request.param, rank=rank, world_size=2)
        state = run_state(
            model, TrainConfig(precision="fp32"), device=CPU, group=group, sharding=divided
        )
        state.load_weights(initial_weights(config, 0))
        found.append(state)
    yield found
    for state in found:
        state.close()
    dist.destroy_process_group()


class Saving:
    """Both ranks' writers, and rank 0's publisher."""

    def __init__(self, folder: Path, states: list[TrainState]) -> None:
        self.run, self.states = open_storage(str(folder)), states
        self.fence = Fence(self.run, launcher=0)
        self.ledger = LedgerWriter(self.run, self.fence)
        self.checkpoints = RunCheckpoints(self.run, self.fence)
        keep: dict[str, Any] = {"keep": CheckpointConfig(), "pinned": set, "val_losses": {}}
        publisher = Publisher(self.checkpoints, self.ledger, **keep)
        self.writers = [
            ShardWriter(
                self.checkpoints,
                state.sharding,
                state.group,
                publisher=publisher if rank == 0 else None,
                config=state.model.config,
                tokenizer=TOKENIZER,
            )
            for rank, state in enumerate(states)
        ]

    def on_all(self, work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(NUM_RANKS) as ranks:
            return list(ranks.map(work, range(NUM_RANKS)))

    def save(self, step: int, *, must: bool = False) -> bool:
        """Returns whether the ranks saved, which they must agree on."""
        self.ledger.step(step=step, loss=1.0)
        metadata = metadata_of(step, generation=self.fence.generation)
        answers = self.on_all(
            lambda rank: self.writers[rank].save(metadata, self.states[rank], must=must)
        )
        (saved,) = {*answers}
        return saved

    def finish(self) -> Ledger:
        self.on_all(lambda rank: self.writers[rank].finish())
        self.ledger.close()
        return Ledger.read(self.run)


def test_the_shards_of_a_moment_are_stored_while_the_state_changes(
    tmp_path: Path, states: list[TrainState]
) -> None:
    saving, config = Saving(tmp_path, states), states[0].model.config
    for seed in (1, 2, 3):
        for state in states:
            state.load_weights(initial_weights(config, seed))
        assert saving.save(seed)
        for state in states:
            state.values.fill_(float("nan"))
        wait_until(lambda: len(saving.checkpoints.names) == seed)  # noqa: B023
    ledger = saving.finish()
    for seed, line in zip((1, 2, 3), ledger.events("checkpoint"), strict=True):
        folder = tmp_path / "checkpoints" / checkpoint_name(seed, 1)
        assert verify_checkpoint(folder) == []
        expected = parameter_hash(dict(initial_weights(config, seed)))
        assert line["parameter_hash"] == expected == parameter_hash(load_model(folder).state_dict())
        assert line["exposed_seconds"] <= line["seconds"]
    assert list(saving.checkpoints.spool.iterdir()) == []


def held_up(monkeypatch: pytest.MonkeyPatch, index: int) -> threading.Event:
    """Returns the event for which one rank's thread waits before it stores a shard."""
    store, go = ShardedCheckpoint.store, threading.Event()

    def waiting(self: ShardedCheckpoint, of: int, *files: Any) -> None:
        if of == index:
            go.wait(30)
        store(self, of, *files)

    monkeypatch.setattr(ShardedCheckpoint, "store", waiting)
    return go


def test_a_step_that_one_rank_stores_is_stored_by_all(
    tmp_path: Path, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is still at step 1 when the other one is done with step 2: none saves step 3."""
    go, saving = held_up(monkeypatch, 0), Saving(tmp_path, states)
    stored = lambda step: (tmp_path / "checkpoints" / checkpoint_name(step, 1)).glob("report-*")  # noqa: E731
    assert saving.save(1)
    wait_until(lambda: all(writer._pending is None for writer in saving.writers))
    assert saving.save(2)
    wait_until(lambda: any(stored(2)))
    assert not saving.save(3)
    assert not saving.save(4)
    threading.Timer(0.2, go.set).start()
    assert saving.save(5, must=True)
    ledger = saving.finish()
    assert [line["step"] for line in ledger.events("checkpoint")] == [1, 2, 5]
    assert not any(stored(3)) and not any(stored(4))


def test_the_newest_takes_the_place_of_what_waits_on_all_ranks(
    tmp_path: Path, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes, saving = (
        [held_up(monkeypatch, rank) for rank in range(NUM_RANKS)],
        Saving(tmp_path, states),
    )
    assert saving.save(1)
    wait_until(lambda: all(writer._begun for writer in saving.writers))
    for step in range(2, 9):
        assert saving.save(step)
    for go in goes:
        go.set()
    ledger = saving.finish()
    assert [line["step"] for line in ledger.events("checkpoint")] == [1, 8]


@pytest.mark.parametrize("place", ["copy", "file"])
@pytest.mark.parametrize("whole", [WEIGHTS, TRAIN_STATE])
def test_a_shard_that_is_not_what_was_in_the_state_is_named_and_never_published(
    tmp_path: Path,
    states: list[TrainState],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    whole: str,
) -> None:
    """A bit flips in rank 1's copy before it is written, or in its file before it is read back."""
    write, store = shard_writer.write_file, ShardedCheckpoint.store
    name = shard_of(whole, 1, count=NUM_RANKS)
    flipped: list[str] = []

    def flip(content: bytearray) -> bytearray:
        content[len(content) // 2] ^= 4
        flipped.append(place)
        return content

    def writing(path: Path, pieces: Iterable[bytes]) -> Any:
        if place == "copy" and path.name == name and not flipped:
            header, first, *rest = map(bytes, pieces)
            pieces = [header, bytes(flip(bytearray(first))), *rest]
        return write(path, pieces)

    def storing(self: ShardedCheckpoint, index: int, spooled: Path, *rest: Any) -> None:
        path = spooled / name
        if place == "file" and index == 1 and path.exists() and not flipped:
            path.write_bytes(flip(bytearray(path.read_bytes())))
        store(self, index, spooled, *rest)

    monkeypatch.setattr(shard_writer, "write_file", writing)
    monkeypatch.setattr(ShardedCheckpoint, "store", storing)
    for state in states:
        for vector in state.vectors.values():
            vector.fill_(0.5)
    saving = Saving(tmp_path, states)
    assert saving.save(1)
    wait_until(lambda: Ledger.read(saving.run).events("checkpoint_refused"))
    assert saving.save(2, must=True)
    ledger = saving.finish()
    [refused] = ledger.events("checkpoint_refused")
    assert refused["reason"] == f"{name}, read back, are not what was in the state"
    assert [line["step"] for line in ledger.events("checkpoint")] == [2]


@pytest.mark.parametrize("part", ["values", *AdamW.vectors])
def test_values_that_are_not_finite_are_never_published(
    tmp_path: Path, states: list[TrainState], part: str
) -> None:
    saving = Saving(tmp_path, states)
    assert saving.save(1)
    wait_until(lambda: len(saving.checkpoints.names) == 1)
    flat = StateShares(states[1]).views(1, world_size=NUM_RANKS)[part][0]
    flat[77] = float("inf")
    assert saving.save(2)
    wait_until(lambda: bool(Ledger.read(saving.run).events("checkpoint_refused")))
    flat[77] = 0.0
    assert saving.save(3)
    ledger = saving.finish()
    assert [line["step"] for line in ledger.events("checkpoint")] == [1, 3]
    (refused,) = ledger.events("checkpoint_refused")
    assert refused["step"] == 2
    assert "hold NaN or infinity" in refused["reason"]


def test_an_error_that_no_storage_caused_reaches_its_rank(
    tmp_path: Path, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(tmp_path, states)
    monkeypatch.setattr(ShardedCheckpoint, "store", lambda *_: 1 // 0)
    assert saving.save(1)
    wait_until(lambda: all(writer._failure for writer in saving.writers))
    with pytest.raises(ZeroDivisionError):
        saving.save(2)


def test_a_shard_takes_the_memory_of_its_own_values_once(
    tmp_path: Path, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, seen, copied = ShardWriter._store_own, [], []

    def watched_store(self: ShardWriter, shard: Shard) -> None:
        with NewMemory([shard.flat], CPU) as new:
            store(self, shard)
        seen.append(new.largest_bytes)

    def watched(work: Callable[[int], Any], rank: int) -> Any:
        with NewMemory([], CPU) as new:
            done = work(rank)
        copied.append(new.largest_bytes)
        return done

    monkeypatch.setattr(ShardWriter, "_store_own", watched_store)
    monkeypatch.setattr(Together, "gather", lambda self, value: [value] * NUM_RANKS)
    saving = Saving(tmp_path, states)
    monkeypatch.setattr(
        saving, "on_all", lambda work: [watched(work, rank) for rank in range(NUM_RANKS)]
    )
    assert saving.save(1)
    wait_until(lambda: len(saving.checkpoints.names) == 1)
    assert len(seen) == NUM_RANKS and max(seen) <= 8, "the number of updates"
    assert copied == [4 * 3 * state.owned.num_values for state in states]
    assert max(copied) <= 0.52 * 4 * 3 * states[0].layout.size
    assert saving.finish().events("checkpoint")


def test_a_shard_that_storage_lost_is_never_published(
    tmp_path: Path, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ShardedCheckpoint.store

    def losing(self: ShardedCheckpoint, index: int, *files: Any) -> None:
        lost = tmp_path / "checkpoints" / self.name / self.file("train_state.safetensors", 0)
        if index == 1:
            wait_until(lost.exists)
            lost.unlink()
        store(self, index, *files)

    saving = Saving(tmp_path, states)
    with monkeypatch.context() as patch:
        patch.setattr(ShardedCheckpoint, "store", losing)
        assert saving.save(1)
        wait_until(lambda: bool(Ledger.read(saving.run).events("checkpoint_refused")))
    assert saving.save(2)
    ledger = saving.finish()
    (refused,) = ledger.events("checkpoint_refused")
    assert refused["reason"] == "train_state-shard-00001-of-00002.safetensors did not arrive whole"
    assert [line["step"] for line in ledger.events("checkpoint")] == [2]


def test_a_rank_that_dies_while_the_others_finish_is_replaced(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": {"sample_prompts": []},
        "checkpoint": {"save_every_steps": 4},
    }
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"), **settings)
    train(undisturbed, rank=0, world_size=1)
    plan = tiny_plan(str(tmp_path / "disturbed"), scaling={"shard": "parameters"}, **settings)
    run_in_rounds(plan, tmp_path, [CutOff(1, 8, "mid_shard:3:exit")])
    ledgers = [Ledger.read(each.run) for each in (undisturbed, plan)]
    begun, resumed = (line["step"] for line in ledgers[1].events("start"))
    # From step 4, unless its shards were not all stored when the rank died
    assert begun == 0 and resumed in (0, 4)
    hashes = [ledger.events("checkpoint")[-1]["parameter_hash"] for ledger in ledgers]
    assert hashes[0] == hashes[1]
    assert ledgers[1].events("finish")
