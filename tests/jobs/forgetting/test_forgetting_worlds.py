"""One hash for each way to forget: whatever the model, the optimizer, the number of workers and what
they divide, killed or not, the bits are those of the run trained from the beginning."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import open_storage
from jobs.run.base import recorded_base
from jobs.run.run_plan import RunPlan
from jobs.training.warm_start import begin, like_its_source
from model.text.tokenizer import Tokenizer
from raymill.state.shard import Shard
from tests.foreign_models import small
from tests.jobs.forgotten_runs import Forgotten, laid_out, some_documents
from tests.jobs.mapped_runs import mapped_plan, write_conversations
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import final_hash
from tests.jobs.saved_models import saved

FOUR_LANES = {
    "max_tokens": 2600,
    "global_batch_size": 8,
    "batch_ramp_start": None,
    "batch_ramp_tokens": 0,
}
LLAMA = {
    "architecture": "llama",
    "activation_function": "swiglu",
    "n_embd": 80,
    "n_head": 4,
    "n_kv_head": 2,
}


def of_text(
    train: dict[str, Any], model: Callable[[int], dict[str, Any]] = lambda vocab: {}
) -> Callable[[Path], RunPlan]:
    def made(folder: Path) -> RunPlan:
        return with_model(mapped_plan(folder, train=FOUR_LANES | train), model)

    return made


def with_model(plan: RunPlan, model: Callable[[int], dict[str, Any]]) -> RunPlan:
    values = plan.config.model_dump(mode="json")
    values["model"] |= model(plan.config.model.vocab_size)
    if "config" in values["model"]:
        values["model"] = {"config": values["model"]["config"]}
    plan = replace(plan, config=RunConfig.model_validate(values))
    plan.run.write_bytes("config.yaml", to_yaml(plan.config).encode())
    return plan


def foreign(vocab_size: int) -> dict[str, Any]:
    return {"config": small("qwen3", vocab_size=vocab_size).values}


def of_chat(folder: Path) -> RunPlan:
    file = write_conversations(folder / "texts/chats.jsonl")
    data = {"source": [str(file)], "format": "chat"}
    train = FOUR_LANES | {"document_mask": True, "max_tokens": 5200}
    return with_model(mapped_plan(folder, train=train, data=data), lambda vocab: LLAMA)


def of_adapter(folder: Path) -> RunPlan:
    plan = mapped_plan(folder, train=FOUR_LANES)
    source = saved(folder / "source", plan.tokenizer_json, "qwen3")
    values = plan.config.model_dump(mode="json") | {"model": {}}
    values["train"] |= {"init_from": str(source), "lora_rank": 4, "precision": "fp32"}
    config = like_its_source(RunConfig.model_validate(values | {"run_id": "adapter"}))
    plan = replace(plan, config=config)
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    return replace(plan, base=recorded_base(plan.run))


KINDS: dict[str, Callable[[Path], RunPlan]] = {
    "gpt2": of_text({}),
    "llama-muon": of_text({"optimizer": "muon", "document_mask": True}, lambda vocab: LLAMA),
    "qwen3": of_text({"document_mask": True}, foreign),
    "gpt2-bf16": of_text({"precision": "bf16", "micro_batches_per_lane": 1}),
    "chat": of_chat,
    "lora": of_adapter,
}
SHARDINGS: list[Shard] = ["none", "optimizer", "gradients", "parameters"]


@dataclass(frozen=True)
class Reference:
    """A run, and the hash of the one that was trained from the beginning without some documents."""

    former: RunPlan
    documents: tuple[str, ...]
    sha256: str


def reference(kind: str, folder: Path) -> Reference:
    former = KINDS[kind](folder)
    run_world(former)
    documents = tuple(some_documents(former, seed=len(kind), num_documents=2))
    found = laid_out(former, *documents)
    sha256 = final_hash(found.from_the_beginning())
    assert sha256 != final_hash(former)
    return Reference(former, documents, sha256)


def forgotten_again(
    known: Reference, world_size: int, shard: Shard, *, kills: bool, seed: int
) -> str:
    """Forgets the documents in a run that is laid out anew; returns the hash."""
    found = laid_out(known.former, *known.documents)
    shutil.rmtree(str(found.asked.new.local_path("")))
    found = laid_out(known.former, *known.documents)
    scaling = found.plan.config.scaling.model_copy(
        update={"shard": shard, "max_workers": world_size}
    )
    config = found.plan.config.model_copy(update={"scaling": scaling})
    plan = replace(found.plan, config=config)
    steps = range(found.asked.plan.first_step + 1, found.asked.plan.of_steps)
    dies_at = random.Random(seed).choice(steps) if kills else None
    return final_hash(
        Forgotten(found.asked, found.start, known.former, plan).trained(
            world_size=world_size, dies_at=dies_at
        )
    )


@pytest.mark.more
@pytest.mark.parametrize(
    ("kind", "world_size", "shard", "kills"),
    [
        ("gpt2", 3, "parameters", True),
        ("llama-muon", 4, "gradients", False),
        ("qwen3", 2, "optimizer", True),
        ("gpt2-bf16", 1, "none", True),
        ("chat", 2, "none", True),
        ("lora", 3, "none", True),
    ],
)
def test_a_kind_of_run__forgets_as_if_from_the_beginning(
    kind: str, world_size: int, shard: Shard, kills: bool, tmp_path: Path
) -> None:
    known = reference(kind, tmp_path)
    assert forgotten_again(known, world_size, shard, kills=kills, seed=1) == known.sha256


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_number_of_workers_and_each_sharding__forgets_to_the_same_hash(
    kind: str, tmp_path: Path
) -> None:
    known = reference(kind, tmp_path)
    for number, (world_size, shard) in enumerate(
        (size, way) for size in range(1, 5) for way in SHARDINGS
    ):
        found = forgotten_again(known, world_size, shard, kills=number % 2 == 0, seed=number)
        assert found == known.sha256, (world_size, shard)


@pytest.mark.more
def test_an_adapter__keeps_its_base_and_its_seed(tmp_path: Path) -> None:
    known = reference("lora", tmp_path)
    found = laid_out(known.former, *known.documents)
    run = open_storage(found.asked.new.uri)
    assert recorded_base(run) == recorded_base(known.former.run)
