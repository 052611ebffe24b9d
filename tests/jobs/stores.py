"""Token stores of random tokens, whole or shard by shard."""

import hashlib
from collections.abc import Sequence

import numpy as np

from cluster.storage.uris import Storage
from jobs.tokens.token_store import MANIFEST, Manifest, Shard, Split, token_dtype
from model.text.tokenizer import Tokenizer


def manifest_of(
    shards: Sequence[Shard],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 1000,
    weights: tuple[float, ...] = (),
) -> Manifest:
    return Manifest(
        tokenizer_hash=tokenizer.hash if tokenizer else "t",
        vocab_size=tokenizer.vocab_size if tokenizer else vocab_size,
        eot_id=tokenizer.eot_id if tokenizer else vocab_size - 1,
        source_hash="s",
        config_hash="c",
        weights=weights,
        revisions={},
        dropped={},
        drop_samples={},
        replaced_utf8=0,
        shards=tuple(shards),
    )


def write_shard(
    storage: Storage,
    number: int,
    size: int,
    *,
    split: Split = "train",
    source: int = 0,
    vocab_size: int = 1000,
) -> tuple[Shard, np.ndarray]:
    """Writes random tokens, a function of the number."""
    tokens = (
        np.random.default_rng(number).integers(0, vocab_size, size).astype(token_dtype(vocab_size))
    )
    name = f"{'shard' if split == 'train' else 'val'}-{number:05d}.bin"
    storage.write_bytes(name, tokens.tobytes())
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Shard(name, split, source, size, 1, 4 * size, digest), tokens.astype(np.int64)


def make_store(
    storage: Storage, *, sizes: Sequence[int], vocab_size: int = 1000, val_size: int = 0
) -> np.ndarray:
    """Makes a finished store with train shards of the given sizes; returns their tokens."""
    written = [
        write_shard(storage, number, size, vocab_size=vocab_size)
        for number, size in enumerate(sizes)
    ]
    val, _ = write_shard(storage, len(sizes), val_size, split="val", vocab_size=vocab_size)
    manifest = manifest_of([*(shard for shard, _ in written), val], vocab_size=vocab_size)
    storage.write_bytes(MANIFEST, manifest.to_json())
    return np.concatenate([tokens for _, tokens in written])
