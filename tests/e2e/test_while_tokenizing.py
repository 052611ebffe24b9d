"""Training that starts while the corpus is still being tokenized ends with the bits of training that waits."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local.local_cluster import cpus_per_node
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, run_storage
from cluster.stages.stage import Connection, connected, run_stage
from jobs.run.ledger import Ledger
from model.checkpoint_folder import read_metadata

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders with so many files, a task each, that tokenizing takes longer than the start of the workers."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiourstlnm", k=rng.randint(2, 7))) for _ in range(300)]
    folders = []
    for num_files in (250, 450):
        folder = tmp_path_factory.mktemp("source")
        for number in range(num_files):
            (folder / f"{number:03d}.txt").write_text(" ".join(rng.choices(words, k=100)))
        folders.append(str(folder))
    return folders


def run_config(sources: list[str], storage: Path, run_id: str, **train: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_id": run_id,
        "model": {"preset": "tiny"},
        "data": {"source": sources, "weights": [2, 1], "vocab_size": 300, "val_fraction": 0.2, "shard_bytes": 1},
        "train": {
            "max_tokens": 100 * 8 * 32,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "seq_len": 32,
            "learning_rate": 3e-3,
            "eval_every_steps": 50,
            "eval_max_tokens": 1000,
            "shuffle_window_rows": 64,
        },
        "checkpoint": {"save_every_steps": 5, "num_to_keep": 100},
        "cluster": {"num_nodes": 2},
        "storage": {"uri": str(storage)},
    }
    return validate_config(values | {"train": values["train"] | train}, RunConfig)


@pytest.fixture(scope="module")
def connection(sources: list[str]) -> Iterator[Connection]:
    config = run_config(sources, Path("unused"), "unused", while_tokenizing=True)
    with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
        yield connection


def test_the_bits_are_those_of_a_finished_store(connection: Connection, sources: list[str], tmp_path: Path) -> None:
    configs = [
        run_config(sources, tmp_path, "growing", document_mask=True, while_tokenizing=True),
        run_config(sources, tmp_path, "finished", document_mask=True),
    ]
    results = [run_stage(connection, "jobs.pretrain", config) for config in configs]
    ledgers = [Ledger.read(run_storage(config)) for config in configs]
    losses, other_losses = ([line["loss"] for line in ledger.steps] for ledger in ledgers)
    assert losses == other_losses
    for name in ("parameter_hash", "val_loss", "val_bits_per_byte"):
        assert results[0][name] == results[1][name], name

    checkpoints = sorted(tmp_path.glob("runs/growing/checkpoints/step-*"))
    first, finished = read_metadata(checkpoints[0]), read_metadata(Path(results[1]["checkpoint"]))
    assert first.data_manifest_hash is None, "the first steps were to run on an unfinished store"
    assert first.data_identity == finished.data_identity
    assert finished.data_manifest_hash is not None
