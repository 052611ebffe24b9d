"""The weights that a run of an adapter freezes, as every worker finds them. This module does not
import PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.bases import verified_base
from cluster.storage.uris import Storage

BASE_FILE = "base.json"
ALIGNMENT_BYTES = 64
"""Tensors of a base begin at multiples of it in their file, as far as their sizes are such, so that
workers compute with the file's own memory: a tensor's place decides how vector kernels round."""


@dataclass(frozen=True)
class Base:
    """The checkpoint with a run's frozen weights."""

    uri: str
    parameter_hash: str
    source: str  # where the weights came from

    def folder(self, storage_uri: str) -> Path:
        """Returns a local folder with it, verified. Raises `CheckpointError`."""
        return verified_base(self.uri, self.parameter_hash, storage_uri)


def recorded_base(run: Storage) -> Base | None:
    """Returns the base that a run began with; None where it trains all weights."""
    content = run.find_bytes(BASE_FILE)
    return None if content is None else Base(**json.loads(content))
