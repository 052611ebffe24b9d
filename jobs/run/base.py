"""The weights that a run of an adapter freezes: stored once, and found by every worker."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from cluster.settings.run import RunConfig, run_storage
from cluster.storage.bases import base_folder, verified_base
from cluster.storage.uris import Storage, open_storage
from model.config import Shape
from model.files.checkpoint import parameter_hash, write_checkpoint
from model.files.checkpoint_folder import MANIFEST, Metadata
from model.files.durable_files import move_into_place
from model.text.tokenizer import Tokenizer

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


def store_base(
    config: RunConfig,
    shape: Shape,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    source: str,
) -> Base:
    """Stores the weights that a run freezes, unless an earlier run has, and records them."""
    storage = open_storage(config.storage.uri)
    hashed = parameter_hash(weights)
    target = base_folder(storage, [str(shape), hashed, tokenizer.hash])
    if not target.exists(MANIFEST):
        _store(target, shape, weights, tokenizer)
    base = Base(target.uri, hashed, source)
    run_storage(config).write_bytes(BASE_FILE, json.dumps(asdict(base), indent=2).encode())
    return base


def _store(
    target: Storage, shape: Shape, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Two runs may store the same base at once: its bytes depend on no run."""
    metadata = Metadata(
        run_id="base", step=0, tokens_seen=0, data_manifest_hash=None, code_version=""
    )
    local = target.local_path("")
    beside = None if local is None else local.parent
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=beside) as scratch:
        folder = Path(scratch) / "base"
        write_checkpoint(
            folder,
            config=shape,
            state=weights,
            tokenizer=tokenizer,
            metadata=metadata,
            train_state=None,
            alignment=ALIGNMENT_BYTES,
        )
        if local is None:
            parent = open_storage(target.uri.rpartition("/")[0])
            parent.upload_folder(folder, target.uri.rpartition("/")[2], last=MANIFEST)
        elif not target.exists(MANIFEST):
            move_into_place(folder, local)
