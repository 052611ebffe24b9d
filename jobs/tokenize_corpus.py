"""Stage: the corpus as a token store, with the same bytes for any number of workers, kills and restarts.

Two passes over the files. The first indexes the documents; from that the driver decides, in canonical order, what is
kept and where it goes. The second writes the shards. The manifest comes last: without one there is no store.
"""

import hashlib
import sys
from typing import Any

from cluster.config import DataConfig, RunConfig
from cluster.progress import say
from cluster.stage import stage_main
from cluster.storage import Storage, join_uri, open_storage
from jobs.corpus_index import index_corpus, source_hash
from jobs.documents import Listing, empty_corpus, list_corpus
from jobs.packing import count_drops, drop_duplicates, plan_shards
from jobs.shard_writer import write_shards
from jobs.token_store import MANIFEST, SOURCES, Manifest, TokenStoreError, canonical_json, read_manifest
from jobs.train_tokenizer import ensure_tokenizer
from model.tokenizer import Tokenizer

_SHAPING = {"text_field", "invalid_utf8", "max_document_bytes", "dedup", "val_fraction", "shard_bytes"}
"""The settings that shape the shards, beside the corpus and its tokenizer."""


def tokenize(config: RunConfig) -> dict[str, Any]:
    """Makes the token store of `config.data` under `config.storage`, or finds it there. Needs Ray.

    Raises `CorpusError`, also when no document is left to tokenize.
    """
    listing = list_corpus(config.data.source)
    for uri in listing.skipped:
        say(f"skipped {uri}: its ending is unknown")
    tokenizer, _ = ensure_tokenizer(config, listing)
    shaping = _shaping(config.data)
    key = hashlib.sha256(canonical_json([shaping, listing.identity(), tokenizer.hash])).hexdigest()[:12]
    store = open_storage(config.storage.uri).child(f"tokens/{key}")
    manifest = _finished(store) or _build(store, listing, tokenizer, config.data)
    return {
        "manifest": join_uri(store.uri, MANIFEST),
        "manifest_hash": manifest.hash,
        "documents": manifest.total("documents"),
        "tokens": manifest.total("tokens"),
        "bytes": manifest.total("bytes"),
        "dropped": manifest.dropped,
        "shards": {shard.file: shard.sha256 for shard in manifest.shards},
        "train_tokens": manifest.total("tokens", "train"),
        "val_tokens": manifest.total("tokens", "val"),
        "val_bytes": manifest.total("bytes", "val"),
    }


def _shaping(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(mode="json", include=_SHAPING)


def _finished(store: Storage) -> Manifest | None:
    if not store.exists(MANIFEST):
        return None
    try:
        return read_manifest(store)
    except TokenStoreError as error:
        say(f"mending the token store: {error}")
        return None


def _build(store: Storage, listing: Listing, tokenizer: Tokenizer, data: DataConfig) -> Manifest:
    index = index_corpus(listing.files, data)
    if data.dedup:
        index = drop_duplicates(index)
    dropped = count_drops(index)
    if index["drop"].all():
        raise empty_corpus(len(listing.files), dropped)
    plans = plan_shards(index, val_fraction=data.val_fraction, shard_bytes=data.shard_bytes)
    uris = [entry.key for entry in listing.files]
    manifest = Manifest(
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        source_hash=source_hash(index),
        config_hash=hashlib.sha256(canonical_json(_shaping(data))).hexdigest(),
        dropped=dropped,
        replaced_utf8=int(index["replaced"][index["drop"] == 0].sum()),
        shards=tuple(write_shards(store, plans, uris, tokenizer=tokenizer, data=data)),
    )
    store.write_bytes(SOURCES, canonical_json({"files": listing.identity(), "skipped": listing.skipped}))
    store.write_bytes(MANIFEST, manifest.to_json())
    return manifest


if __name__ == "__main__":
    sys.exit(stage_main(tokenize))
