"""Runs of a tiny model on texts of numbers, each with its own storage folder, and what their
ledgers hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, max_steps, run_storage
from jobs.run.ledger import Ledger

SEQ_LEN = 32


def tiny_run(
    folder: Path,
    run_id: str,
    *,
    num_steps: int,
    save_every_steps: int,
    eval_every_steps: int | None = None,
    batch_size: int = 8,
    lane_size: int = 1,
    dropout: float = 0.0,
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    **scaling: Any,
) -> RunConfig:
    """Returns the settings of a run on `folder/corpus` that keeps everything in
    `folder/storage`."""
    values = {
        "run_id": run_id,
        "model": model
        if model and "config" in model
        else {"preset": "tiny", "dropout": dropout, **(model or {})},
        "data": {"source": str(folder / "corpus"), "vocab_size": 300, "val_fraction": 0.2},
        "train": {
            "max_tokens": num_steps * batch_size * SEQ_LEN,
            "global_batch_size": batch_size,
            "micro_batch_size": lane_size,
            "seq_len": SEQ_LEN,
            "learning_rate": 3e-3,
            "eval_every_steps": eval_every_steps or num_steps,
            **(train or {}),
        },
        "scaling": scaling,
        "checkpoint": {"save_every_steps": save_every_steps},
        "storage": {"uri": str(folder / "storage")},
    }
    return validate_config(values, RunConfig)


def ledger_of(config: RunConfig) -> Ledger:
    return Ledger.read(run_storage(config))


def losses(config: RunConfig) -> list[float]:
    """Returns the loss of each step of a finished run."""
    steps = ledger_of(config).steps
    assert [line["step"] for line in steps] == list(range(1, max_steps(config) + 1))
    return [line["loss"] for line in steps]
