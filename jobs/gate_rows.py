"""The rows on which a checkpoint is compared with the one that is served: the first of its run's validation split."""

from typing import Any

from cluster.config import EvaluateConfig, StorageConfig
from cluster.registry import find_checkpoint
from jobs.evaluate import validation_split
from jobs.token_store import TokenStoreError
from jobs.token_stream import TokenStream
from model.checkpoint import CheckpointError, read_config

NUM_ROWS = 8
MAX_TOKENS = 8192


def gate_rows(checkpoint: str, storage_uri: str) -> dict[str, Any]:
    """Rows as long as the model's context, or as the split where that is shorter; none, and the reason, where the
    checkpoint does not say what it was validated on, or that is not here."""
    try:
        found, folder = find_checkpoint(checkpoint, storage_uri)
        config = EvaluateConfig(checkpoint=found, storage=StorageConfig(uri=storage_uri))
        tokens, split = validation_split(folder, config)
        seq_len = min(read_config(folder).n_positions, MAX_TOKENS)
        stream = TokenStream.open(tokens, split=split, seq_len=seq_len)
    except (CheckpointError, TokenStoreError) as error:
        return {"rows": [], "reason": str(error)}
    num_rows = stream.count_rows(at_most=min(NUM_ROWS, max(1, MAX_TOKENS // seq_len)))
    return {"rows": stream.rows(range(num_rows))[0].tolist(), "reason": ""}
