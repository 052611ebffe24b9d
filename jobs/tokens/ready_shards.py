"""Copies the shards of finished token stores (`tokens://` sources) into a new store."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cluster.output.progress import progress
from cluster.storage.uris import Storage, open_storage
from jobs.corpus.listing import CorpusError
from jobs.tokens.shard_writer import ChunkResult, file_sha256
from jobs.tokens.token_store import TokenStoreError, read_manifest, shard_file
from model.files.checkpoint_folder import fingerprint
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer


def copy_shards(
    store: Storage,
    locations: Mapping[int, str],
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    *,
    first_chunk: int,
) -> dict[int, ChunkResult]:
    """Returns a result for each shard of the stores at `locations` (source -> location), numbered
    after the chunks.

    Raises `CorpusError` for a store of another tokenizer or format, `TokenStoreError` for a shard
    whose hash is wrong.
    """
    results: dict[int, ChunkResult] = {}
    for source, location in locations.items():
        other = open_storage(location)
        manifest = read_manifest(other)
        if (manifest.tokenizer_hash, manifest.bos_id, manifest.chat) != (
            tokenizer.hash,
            tokenizer.bos_id,
            chat,
        ):
            raise CorpusError(
                f"tokens://{location} was made with another tokenizer ({manifest.tokenizer_hash[:12]}, not "
                f"{tokenizer.hash[:12]}), BOS, data.format or chat template; set data.tokenizer to its tokenizer.json, "
                "or tokenize its text again"
            )
        with progress(f"copying {location}", total=manifest.total("bytes") / 1e6) as advance:
            for shard in manifest.shards:
                number = first_chunk + len(results)
                name = shard_file(shard.split, number)
                if not (store.exists(name) and file_sha256(store, name) == shard.sha256):
                    with tempfile.TemporaryDirectory(prefix="raymill-shard-") as folder:
                        path = Path(folder, name)
                        other.download_file(shard.file, path)
                        if fingerprint(path)["sha256"] != shard.sha256:
                            raise TokenStoreError(
                                f"{other.uri}/{shard.file} has other bytes than its manifest says"
                            )
                        store.upload_file(path, name)
                copied = replace(shard, file=name, source=source)
                results[number] = ChunkResult(shards=[copied], documents=shard.documents)
                advance(shard.bytes / 1e6)
    return results
