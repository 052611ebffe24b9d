"""A tiny run, trained for real in this process: its token store, ledger and checkpoints."""

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.tokens.token_store import MANIFEST, TOKENIZER, Manifest, Shard, Split, token_dtype
from jobs.training.train_loop import train
from model.files.checkpoint_folder import Metadata
from model.text.tokenizer import Tokenizer, train_bpe
from raymill.state.train_state import TrainState
from tests.jobs.stores import manifest_of
from tests.waiting import wait_until


def make_text(num_words: int, *, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeiourstlnm", k=rng.randint(2, 7))) for _ in range(60)]
    return " ".join(rng.choices(words, k=num_words)) + ".\n"


def make_store(storage_uri: str, tokenizer: Tokenizer, texts: dict[Split, str]) -> Manifest:
    """Makes a token store of documents of 20 words, under `tokens/made`."""
    store = open_storage(storage_uri).child("tokens/made")
    shards = []
    for split, text in texts.items():
        documents = re.findall(r"(?:\S+\s*){1,20}", text)
        ids = [
            token
            for document in documents
            for token in [*tokenizer.encode(document), tokenizer.eot_id]
        ]
        content = np.array(ids, token_dtype(tokenizer.vocab_size)).tobytes()
        store.write_bytes(f"{split}.bin", content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(
            Shard(f"{split}.bin", split, 0, len(content) // 2, 1, len(text.encode()), digest)
        )
    manifest = manifest_of(shards, tokenizer=tokenizer)
    store.write_bytes(TOKENIZER, tokenizer.to_json())
    store.write_bytes(MANIFEST, manifest.to_json())
    return manifest


def tiny_plan(
    storage_uri: str,
    *,
    tokens_in: str | None = None,
    num_steps: int = 8,
    train: dict[str, Any] | None = None,
    **branches: Any,
) -> RunPlan:
    """Returns the plan of a run that is ready to train. Its tokens may lie in another storage."""
    texts: dict[Split, str] = {"train": make_text(1500), "val": make_text(400, seed=1)}
    tokenizer = train_bpe(texts.values(), vocab_size=300)
    make_store(tokens_in or storage_uri, tokenizer, texts)
    settings = {
        "max_tokens": num_steps * 4 * 32,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "seq_len": 32,  # less than the model could take
        "learning_rate": 1e-2,
        "precision": "fp32",
        "eval_every_steps": 4,
        "sample_prompts": ["tell me <b>more</b> & more"],
    }
    config = RunConfig.model_validate(
        {
            "run_id": "tiny",
            "model": {"preset": "tiny", "n_positions": 48, "vocab_size": tokenizer.vocab_size},
            "train": settings | (train or {}),
            "checkpoint": {"save_every_steps": 3},
            "scaling": {"max_workers": 1},
            "storage": {"uri": storage_uri},
        }
        | branches
    )
    tokens_uri = open_storage(tokens_in or storage_uri).child("tokens/made").uri
    plan = RunPlan(config, tokens_uri, tokenizer.to_json(), code_version="test")
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    return plan


def trained_run(
    storage_uri: str, *, precision: str = "fp32", document_mask: bool = False
) -> RunPlan:
    """Trains a run of eight steps that validates at steps 4 and 8 and saves at 3, 6 and 8. It waits
    for each checkpoint: on a busy machine a newer one would take the place of one that is not
    stored yet."""
    plan = tiny_plan(storage_uri, train={"precision": precision, "document_mask": document_mask})
    save = CheckpointWriter.save

    def save_and_wait(
        writer: CheckpointWriter, metadata: Metadata, state: TrainState, *, must: bool
    ) -> None:
        save(writer, metadata, state, must=must)
        wait_until(
            lambda: any(f"{metadata.step:09}" in name for name in RunCheckpoints(plan.run).names)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", save_and_wait)
        train(plan, rank=0, world_size=1)
    return plan


def newest_checkpoint(plan: RunPlan) -> Path:
    checkpoints = RunCheckpoints(plan.run)
    return checkpoints.fetch(checkpoints.names[-1], Path())


def final_hash(plan: RunPlan) -> str:
    """The weights' hash in the newest checkpoint."""
    return str(Ledger.read(plan.run).events("checkpoint")[-1]["parameter_hash"])
