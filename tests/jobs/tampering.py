"""A real run of eight steps with checkpoints at 3, 6 and 8, and ways to spoil it."""

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.storage.uris import Storage
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import LEDGER


def flip_byte(path: Path, *, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_setting(run: Storage, **train: Any) -> None:
    """In the run's recorded settings."""
    settings = yaml.safe_load(run.read_bytes(CONFIG_FILE))
    settings["train"] |= train
    run.write_bytes(CONFIG_FILE, yaml.safe_dump(settings).encode())


def change_line(run: Storage, step: int, **fields: Any) -> None:
    """In the ledger's line of a step."""
    lines = [json.loads(line) for line in run.read_bytes(LEDGER).splitlines()]
    for line in lines:
        if "event" not in line and line["step"] == step:
            line.update(fields)
    run.write_bytes(LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())


def checkpoint_folder(run: Storage, step: int) -> Path:
    place = run.local_path("checkpoints")
    assert place is not None
    (folder,) = place.glob(f"step-{step:09d}*")
    return folder
