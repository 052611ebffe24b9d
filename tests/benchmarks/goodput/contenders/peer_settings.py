"""What the peers' worker processes are told, as JSON."""

from typing import Any

from tests.benchmarks.goodput.contenders.contract import (
    BATCH,
    HASH_EVERY_STEPS,
    PRESET,
    SEQ_LEN,
    VOCAB,
    Contender,
)


def peer_settings(contender: Contender) -> dict[str, Any]:
    settings, folder = contender.settings, contender.folder
    return {
        "log": str(folder / "steps.jsonl"),
        "storage": str(folder / "storage"),
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "vocab": VOCAB,
        "preset": PRESET,
        "hash_every_steps": HASH_EVERY_STEPS,
        "row_s": settings.row_s,
        "save_every_steps": settings.save_every_steps,
        "has_notices": settings.has_notices,
        "look_s": settings.look_s,
    }
