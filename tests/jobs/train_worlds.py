"""Trains a small model over real gloo processes, for worlds of several sizes in turn, and prints
the results.

    python -m tests.jobs.train_worlds MAX_WORLD_SIZE|SIZE,SIZE,… FOLDER [SUITE]

The last word names other cases, of `SUITES`. Prints one JSON object: by case and world, the
parameter hash and losses of every rank, and the bytes sent a step. Up to a size, all worlds are
tried, and one "resized": that is one run whose world has another size at each step, and whose state
is sharded in another way.
"""

import itertools
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.settings.run import RunConfig, state_scaling
from cluster.settings.train import Optimizer
from jobs.exact.compute import first_weights
from jobs.exact.frozen import freeze
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.exact.stored_state import hashes_of_state, vectors_by_name
from jobs.snapshots import snapshots
from jobs.snapshots.choice import Holding, Snapshot, choose
from jobs.snapshots.slots import NUM_SLOTS, Bytes, Slots
from jobs.snapshots.snapshots import Share, Snapshots
from model.adapters.lora import Adapter
from model.decoders.adapted import AdaptedModel
from model.decoders.make import initial_weights, new_decoder
from model.files.checkpoint_folder import WEIGHTS
from model.files.durable_files import write_file
from model.kernels.native_library import MARCH_VARIABLE
from model.linear_cross_entropy import IGNORE_INDEX
from model.numerics import Precision
from raymill.files.safetensors_file import safetensors_pieces
from raymill.state.shard import Shard
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import hash_of_weights, own_stretches, restore
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup
from tests.foreign_models import FAMILIES, ON_CPUS_ALONE, WITHOUT_DOCUMENTS, small
from tests.jobs.sent_bytes import sent_bytes
from tests.jobs.train_states import stored, whole

NUM_STEPS = 4
RESIZES = random.Random(8).choices(range(1, 6), k=NUM_STEPS)  # the world's size at each step
SEQ_LEN, VOCAB, EOT = 16, 301, 7
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    precision: str = "fp32"
    activation: str = "gelu"
    num_lanes: int = 7
    shard: Shard = "none"
    group: int | None = None  # workers that hold one copy
    exact: bool = True
    start_lanes: int | None = None  # of the first step, where the batch grows
    compute: str = "cpu"
    recompute: bool = False
    micro_batches: int = 1  # of a lane
    documents: bool = False  # see nothing of each other
    llama: bool = False
    chat: bool = False  # rows of conversations, of which some targets do not count
    one_block: bool = False  # a model of so few values that one rank owns all parts
    family: str = ""  # of a model of transformers, in place of ours
    optimizer: Optimizer = "adamw"
    num_layers: int = 3
    vocab_size: int = VOCAB
    is_tied: bool = True
    dropout: float = 0.1
    grad_clip: float = 1.0
    lora_rank: int | None = None  # of an adapter of the family's model

    @property
    def numbers(self) -> "Case":
        """The case whose bits this one must have."""
        return replace(self, shard="none", group=None, exact=True, recompute=False)

    def config(self) -> RunConfig:
        model: Any = {
            "preset": "tiny",
            "vocab_size": self.vocab_size,
            "n_positions": SEQ_LEN,
            "n_layer": self.num_layers,
            "n_embd": 72,
            "n_head": 4,
            "activation_function": self.activation,
            "dropout": self.dropout,
            "tie_word_embeddings": self.is_tied,
        }
        if self.llama:
            model |= {
                "architecture": "llama",
                "activation_function": "swiglu",
                "n_kv_head": 2,
                "n_embd": 80,
            }
        if self.one_block:
            model |= {"n_layer": 1, "n_embd": 1, "n_head": 1}
        if self.family:
            model = small(self.family)
        if self.lora_rank:
            model = model.with_adapter(Adapter(self.lora_rank, 2 * self.lora_rank, ()))
        train = {
            "global_batch_size": 2 * self.micro_batches * self.num_lanes,
            "micro_batch_size": 2,
            "micro_batches_per_lane": self.micro_batches,
            "compute": self.compute,
            "recompute": self.recompute,
            "document_mask": self.documents,
            "max_tokens": 1000 * SEQ_LEN,
            "precision": self.precision,
            "exact": self.exact,
            "optimizer": self.optimizer,
            "grad_clip": self.grad_clip,
            "lora_rank": self.lora_rank,
            "init_from": "the base" if self.lora_rank else None,
        }
        if self.start_lanes:
            train |= {
                "batch_ramp_start": 2 * self.start_lanes,
                "batch_ramp_tokens": 20 * 2 * SEQ_LEN,
            }
        return RunConfig.model_validate(
            {
                "model": model,
                "train": train,
                "scaling": {
                    "max_workers": 1,
                    "shard": self.shard,
                    "shard_group": self.group
                    if self.shard in ("gradients", "parameters")
                    else None,
                },
            }
        )


CASES = [
    Case(),
    Case(
        "bf16", compute="plain", recompute=True, documents=True, micro_batches=2, shard="parameters"
    ),
    Case("bf16", recompute=True, documents=True, micro_batches=2, shard="gradients", group=2),
    Case(num_lanes=13, start_lanes=5, shard="parameters", group=2),  # 5, 7, 9, then 13 lanes
    Case(optimizer="muon", llama=True, shard="gradients", group=2),
    Case(exact=False),
]
OTHER_CASES = [
    Case(activation="relu", shard="optimizer"),
    Case("bf16", "relu", shard="parameters"),
    Case(compute="plain", shard="parameters", group=2),
    Case(num_lanes=8, shard="gradients"),
    Case("bf16", documents=True, llama=True, shard="parameters", group=2),
    Case(chat=True, documents=True, micro_batches=2, num_lanes=5, shard="gradients"),
    Case(one_block=True, shard="parameters"),
    Case(optimizer="muon"),
    Case("bf16", optimizer="muon", compute="plain", shard="parameters"),
    Case(exact=False, chat=True),
]
"""Those of `make test-more`."""
MORE_CASES = [
    Case(one_block=True),
    Case(one_block=True, shard="optimizer"),
    Case(one_block=True, shard="gradients"),
    Case("bf16", chat=True, compute="plain", shard="parameters", group=2),
    Case(num_lanes=8, shard="parameters", recompute=True),
    Case(recompute=True, documents=True, micro_batches=3),
    Case("bf16", shard="optimizer"),
    Case("bf16", "relu", compute="plain", shard="gradients"),
    Case(
        "bf16", compute="plain", recompute=True, documents=True, micro_batches=2, shard="optimizer"
    ),
    Case(num_lanes=8),
    Case(num_lanes=13, start_lanes=5),
    Case(num_lanes=13, start_lanes=5, shard="optimizer"),
    Case(llama=True, recompute=True),
    Case("bf16", llama=True, compute="plain", recompute=True, shard="gradients"),
    Case(optimizer="muon", shard="optimizer"),
    Case("bf16", optimizer="muon", llama=True, shard="optimizer"),
    Case("bf16", optimizer="muon", num_lanes=8, shard="gradients"),
    Case(optimizer="muon", llama=True, micro_batches=2, shard="parameters", group=2),
]
"""Those of the longer suite."""


LORA_CASES = [
    Case(compute="plain", family="qwen3", num_lanes=5, lora_rank=4),
    Case(compute="plain", family="qwen3", num_lanes=5, lora_rank=4, shard="parameters"),
    Case(
        "bf16",
        compute="plain",
        family="gemma3_text",
        num_lanes=5,
        lora_rank=2,
        shard="parameters",
        recompute=True,
        documents=True,
        micro_batches=2,
    ),
    Case(
        compute="plain",
        family="gpt_neox",
        num_lanes=7,
        lora_rank=3,
        optimizer="muon",
        shard="optimizer",
    ),
]
FOREIGN_CASES = [
    Case(compute="plain", family="qwen3", num_lanes=5, optimizer="muon"),
    Case(compute="plain", family="qwen3", num_lanes=5, shard="parameters", recompute=True),
    Case("bf16", "gelu", 5, "parameters", compute="plain", family="gemma3_text", documents=True),
    Case(compute="plain", family="qwen3_moe", num_lanes=5, shard="gradients", micro_batches=2),
]


def _each_way(family: str) -> Iterator[Case]:
    """Yields a family's cases, in fp32 and in bf16. What is resized is sharded in each way."""
    ways: list[tuple[Precision, Shard]] = [
        ("fp32", "none"),
        ("fp32", "parameters"),
        ("bf16", "optimizer"),
        ("bf16", "parameters"),
    ]
    for number, (precision, shard) in enumerate(ways):
        yield Case(
            precision,
            num_lanes=5,
            shard=shard,
            compute="plain",
            recompute=number % 2 == 1,
            micro_batches=2,
            documents=family not in WITHOUT_DOCUMENTS,
            chat=True,
            family=family,
        )


COMPILED_FAMILIES = [*FOREIGN_CASES[1:3], [*_each_way("falcon")][-1]]

ODD_CASES = [
    Case("bf16", vocab_size=331, shard="parameters", documents=True),  # 331 is a prime
    Case(num_layers=1, is_tied=False, shard="gradients"),
    Case("bf16", num_layers=1, num_lanes=4, micro_batches=3, shard="optimizer"),
    Case("bf16", num_lanes=6, is_tied=False, recompute=True, compute="plain"),
    Case("bf16", "relu", num_lanes=11, documents=True, recompute=True, shard="gradients"),
    Case("bf16", num_lanes=5, micro_batches=3, compute="plain", documents=True),
    Case("bf16", num_lanes=5, micro_batches=3, documents=True),
    Case(optimizer="muon", shard="optimizer", is_tied=False, num_lanes=6, vocab_size=307),
    Case("bf16", optimizer="muon", llama=True, recompute=True, num_lanes=5, shard="parameters"),
    Case("bf16", num_lanes=5, shard="parameters", compute="plain", family="qwen3_moe"),
    Case(grad_clip=0.0, num_lanes=9, micro_batches=3, shard="optimizer"),
    Case("bf16", grad_clip=0.01, num_lanes=4, llama=True, is_tied=False, chat=True),
    Case(num_layers=2, dropout=0.5, num_lanes=12, start_lanes=4, shard="gradients"),
]
MANY_CASES = [
    Case(num_lanes=13),
    Case("bf16", num_lanes=10, documents=True, shard="optimizer"),
    Case("bf16", num_lanes=9, compute="plain", shard="gradients"),
    Case("bf16", num_lanes=10, recompute=True, shard="parameters", group=3),
]
"""Those for worlds of six and nine."""

PORTABLE_CASES = [
    Case(compute="portable", dropout=0.0, documents=True),
    Case("fp32", "gelu_exact", 5, "optimizer", compute="portable", dropout=0.0, is_tied=False),
    Case("fp32", "relu", 6, "gradients", compute="portable", dropout=0.0, micro_batches=2),
    Case(
        compute="portable",
        dropout=0.0,
        llama=True,
        optimizer="muon",
        shard="parameters",
        recompute=True,
        chat=True,
    ),
]

SUITES = {
    "portable": PORTABLE_CASES,
    "short": CASES,
    "others": OTHER_CASES,
    "more": MORE_CASES,
    "odd": ODD_CASES,
    "many": MANY_CASES,
    "one family": FOREIGN_CASES[1:2],
    "three families": FOREIGN_CASES,
    "lora": LORA_CASES,
    "compiled": [replace(case, compute="compiled") for case in COMPILED_FAMILIES],
    **{family: [*_each_way(family)] for family in FAMILIES},
    **{family: [*_each_way(family)][1::2] for family in ON_CPUS_ALONE},
}


class MadeRows:
    """Rows that are a function of their sample's number. Of conversations, another share of the
    targets counts in each row, and in every fifth none."""

    def __init__(self, *, chat: bool = False) -> None:
        self._chat = chat

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = [
            np.random.default_rng(int(index)).integers(VOCAB, size=SEQ_LEN + 1) for index in indices
        ]
        batch = torch.from_numpy(np.stack(rows))
        batch[:, SEQ_LEN // 2] = EOT
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        if self._chat:
            counted = [
                np.random.default_rng((7, int(i))).random(SEQ_LEN) < int(i) % 5 / 6 for i in indices
            ]
            targets[~torch.from_numpy(np.stack(counted))] = IGNORE_INDEX
        return inputs, targets

    def read_ahead(self, indices: Any) -> None:
        pass


class Trainer:
    """One rank's model in one world."""

    def __init__(self, case: Case, group: WorkerGroup) -> None:
        config, self.group = case.config(), group
        torch.use_deterministic_algorithms(case.exact)
        with torch.device("meta") if case.family else nullcontext():
            model = new_decoder(config.model)
        model.init_weights(0)
        if case.compute == "portable":
            for name, values in first_weights(config, 0):
                model.get_parameter(name).data.copy_(values)
        divide = partial(run_sharding, rank=group.rank, world_size=group.world_size)
        frozen = None
        if isinstance(model, AdaptedModel):
            with base_of(model) as folder:
                sharding = divide(config.scaling)
                frozen = freeze(model, folder, device=CPU, sharding=sharding, group=group)
        self.state = run_state(
            model,
            config.train,
            device=CPU,
            group=group,
            sharding=divide(state_scaling(config)),
            frozen=frozen,
        )
        rows: Any = MadeRows(chat=case.chat)
        self.gradient = step_gradient(
            config,
            self.state,
            rows,
            group,
            eot_id=EOT if case.documents else None,
        )

    def steps(self, steps: range) -> list[float]:
        losses = []
        with sent_bytes() as sent:
            for step in steps:
                measured = self.gradient.of_step(step, StepTimer())
                self.state.apply(norm=measured.norm, learning_rate=1e-2)
                losses.append(measured.loss)
        self.bytes_per_step = sent.num_bytes / len(steps)
        return losses

    @property
    def hash(self) -> str:
        return whole_hash(self.state, self.group)


def whole_hash(state: TrainState, group: WorkerGroup) -> str:
    """Of the weights and the rule's vectors, on a rank that has whole weights, or rank 0; all ranks
    call together."""
    hashes = hashes_of_state(state, group, step=NUM_STEPS)
    vectors = group.broadcast(hashes.vectors if hashes else None)
    parameters = hash_of_weights(state, group, step=NUM_STEPS)
    return f"{parameters} {vectors}" if parameters else ""


@contextmanager
def base_of(model: AdaptedModel) -> Iterator[Path]:
    """Lasts while there is a folder with the file of a random base."""
    weights = dict(initial_weights(model.config.base, 1))
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / WEIGHTS, safetensors_pieces(weights, alignment=64))
        yield Path(folder)


def worlds(rank: int, sizes: str, folder: Path) -> Iterator[tuple[str, WorkerGroup, range]]:
    """Yields the worlds that the rank is part of: a name, the group, and the steps to take in
    it."""
    alone = sizes_of(sizes)
    plan = [(f"{size}", size, range(1, NUM_STEPS + 1)) for size in alone]
    if "," not in sizes:
        for step, size in enumerate(RESIZES, start=1):
            plan.append(("resized", min(size, max(alone)), range(step, step + 1)))
    for number, (name, size, steps) in enumerate(plan):
        if rank < size:
            store = f"file://{folder}/world-{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            yield name, WorkerGroup(rank, size), steps
            dist.barrier()
            dist.destroy_process_group()


def sizes_of(word: str) -> list[int]:
    """Returns the sizes of worlds that are listed, or those up to one."""
    listed = [int(size) for size in word.split(",")]
    return listed if len(listed) > 1 else [*range(1, listed[0] + 1)]


class FileSnapshots(Snapshots):
    """Snapshots whose memory is files, of nodes of two ranks each; a rank reads the files of its
    own node."""

    def __init__(self, group: WorkerGroup, folder: Path) -> None:
        super().__init__(None, group)
        self._launch, self._folder, self._node = "files", folder, f"node-{group.rank // 2}"
        self._node_of_rank = group.gather(self._node)

    def _opened(self, shares: Sequence[Share], attempt: int) -> bool:
        for share in shares:
            path = self._folder / self._node / share.area
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                file.truncate(Slots.bytes_needed(share.num_bytes))
            self._memory[share.area] = (str(path), Slots.at(str(path)))
        return True

    def newest(self, **limits: Any) -> Snapshot:
        found = []
        for path in self._folder.glob("*/*"):
            for slot in range(NUM_SLOTS):
                if header := Slots.at(str(path)).header(slot):
                    assert Slots.at(str(path)).is_whole(slot)
                    found.append(Holding(path.parent.name, path.name, slot, header))
        snapshot = choose(
            found, explained_step=NUM_STEPS, at_least=0, is_left_out=lambda step: False
        )
        assert snapshot is not None
        return snapshot

    def _read(self, held: Holding, spans: list[range]) -> list[Bytes]:
        data = Slots.at(str(self._folder / held.node / held.area)).data(held.slot)
        return [data[span.start : span.stop].copy() for span in spans]


def hand_over(trainer: Trainer, group: WorkerGroup, path: Path, step: int) -> None:
    """Hands the state to the next world, as in-memory snapshots do after even steps, and
    checkpoints after the others: in shards where the state is."""
    if step % 2 == 0:
        FileSnapshots(group, path).after_step(step, trainer.state, attempt=step, carried={})
    elif not trainer.state.sharding.is_whole:
        state = trainer.state
        if state.sharding.writes:
            shares = StateShares(state).own_views()
            shard = own_stretches(
                state, {name: torch.cat([torch.empty(0), *views]) for name, views in shares.items()}
            )
            torch.save(shard, f"{path}-{step}-{group.rank}.pt")
    else:
        flat, state = whole(trainer.state), trainer.state
        if group.rank == 0:
            kept = vectors_by_name(state, flat), state.by_parameter(flat["values"])
            torch.save(kept, f"{path}-{step}-0.pt")


def taken_over(case: Case, group: WorkerGroup, path: Path, step: int) -> Trainer:
    if step % 2:
        trainer = Trainer(case, group)
        files = [
            torch.load(file, weights_only=False)
            for file in path.parent.glob(f"{path.name}-{step}-*.pt")
        ]
        restore(trainer.state, stored(*itertools.chain(*files)))
        return trainer
    trainer, memory = Trainer(case, group), FileSnapshots(group, path)
    memory.restore(group.broadcast(memory.newest() if group.rank == 0 else None), trainer.state)
    return trainer


def run_rank(rank: int, sizes: str, folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    if cases == PORTABLE_CASES:
        torch.set_num_threads(1 + rank % 3)
        if rank % 2 and platform.machine() == "x86_64":
            os.environ[MARCH_VARIABLE] = "x86-64-v3"  # another kind of processor
    snapshots.NUM_SHARES = {"cpu": 3}  # as on GPUs: of the ranks of a node each writes some
    snapshots.CHUNK_BYTES = 40_000  # no share is one piece
    found = []
    resized: dict[Case, list[float]] = {case: [] for case in cases}
    for name, group, steps in worlds(rank, sizes, folder):
        for number, case in enumerate(cases):
            if name == "resized" and not case.exact:
                continue
            path, now = folder / f"state-{number}", case
            if name == "resized":  # and sharded otherwise at each step
                now = replace(
                    case,
                    shard=get_args(Shard)[(number + steps.start) % 4],
                    group=(None, 2)[steps.start % 2],
                )
            trainer = (
                taken_over(now, group, path, steps.start - 1)
                if steps.start > 1
                else Trainer(now, group)
            )
            losses = trainer.steps(steps)
            if name == "resized":
                resized[case] += losses
                hand_over(trainer, group, path, steps.start)
                if steps.stop <= NUM_STEPS:
                    continue
            ranks = group.gather({"hash": trainer.hash, "losses": resized[case] or losses})
            parameters = sum(parameter.numel() for parameter in trainer.state.model.parameters())
            found.append(
                {
                    "case": asdict(case),
                    "world": name,
                    "hashes": [rank["hash"] for rank in ranks if rank["hash"]],
                    "losses": ranks[0]["losses"],  # rank 0 was part of every world
                    "bytes_per_step": sum(group.gather(trainer.bytes_per_step)) / group.world_size,
                    "ring_bytes": 2 * (group.world_size - 1) / group.world_size * 4 * parameters,
                }
            )
    return found


if __name__ == "__main__":
    sizes, folder = sys.argv[1], Path(sys.argv[2])
    world_size = max(sizes_of(sizes))
    [suite] = sys.argv[3:] or ["short"]
    cases = SUITES[suite]
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(world_size) as pool:
        results = pool.starmap(
            run_rank, [(rank, sizes, folder, cases) for rank in range(world_size)], chunksize=1
        )
    print(json.dumps(results[0]))
