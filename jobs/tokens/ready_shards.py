"""Copies the shards of finished token stores (`tokens://` sources) into a new store, with the tables
of their documents."""

import hashlib
import tempfile
from collections.abc import Container, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from cluster.output.progress import progress
from cluster.storage.uris import Storage, open_storage
from jobs.corpus.listing import CorpusError
from jobs.tokens.document_map import (
    DOCUMENTS,
    DocumentMap,
    DocumentTable,
    FileOfCorpus,
    moved,
    read_map,
)
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
    files: list[FileOfCorpus],
    only: Container[int] | None = None,
) -> dict[int, ChunkResult]:
    """Returns a result for each shard of the stores at `locations` (source -> location), numbered
    after the chunks; or for those alone whose numbers `only` has. The files that the stores'
    document maps name are added to `files`; a store without a map gives no tables.

    Raises `CorpusError` for a store of another tokenizer or format, `TokenStoreError` for a shard
    whose hash is wrong.
    """
    results: dict[int, ChunkResult] = {}
    numbers = count(first_chunk)
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
        mapped, first_file = read_map(other, manifest), len(files)
        files += mapped.files if mapped else []
        with progress(f"copying {location}", total=manifest.total("bytes") / 1e6) as advance:
            for shard in manifest.shards:
                number = next(numbers)
                if only is not None and number not in only:
                    continue
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
                tables = _copied_tables(store, mapped, shard.file, name, first_file=first_file)
                results[number] = ChunkResult([copied], tables, documents=shard.documents)
                advance(shard.bytes / 1e6)
    return results


def _copied_tables(
    store: Storage, mapped: DocumentMap | None, shard: str, name: str, *, first_file: int
) -> list[DocumentTable]:
    """Stores the table of a shard that is copied as `name`, and returns it in a list, which is
    empty where the shard has none."""
    documents = mapped and mapped.documents_of(shard)
    if not mapped or not documents:
        return []
    content = mapped.store.read_bytes(documents.table.file)
    if hashlib.sha256(content).hexdigest() != documents.table.sha256:
        raise TokenStoreError(
            f"{mapped.store.uri}/{documents.table.file} has other bytes than its {DOCUMENTS} says; "
            "delete it, and `raymill tokenize --documents` with that store's settings makes it again"
        )
    rewritten, table = moved(content, documents.table, shard=name, first_file=first_file)
    store.write_bytes(table.file, rewritten)
    return [table]
