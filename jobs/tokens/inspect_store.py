"""Inspects a finished token store: its figures (`stats`), its dropped documents (`report`), its
hashes (`verify`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from cluster.output.progress import progress
from cluster.output.result_text import date_of
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.document_map import DOCUMENTS, DocumentMap, problem_of
from jobs.tokens.shard_writer import file_sha256
from jobs.tokens.token_store import (
    MANIFEST,
    SOURCES,
    SPLITS,
    Manifest,
    TokenStoreError,
    read_manifest,
)

_READERS = 4

Uses = Mapping[str, Sequence[str]]
"""The runs' uses of token stores, in words, by the stores' identities."""


def find_store(
    reference: str | None,
    storage_uri: str,
    *,
    uses_in: Callable[[Storage], Uses] = lambda storage: {},
) -> Storage:
    """Returns a store by its folder's or manifest's location, by its key under `tokens/`, or the
    only one there is.

    Raises `TokenStoreError` where several are there and none is named: it lists them with their
    sources, and with what `uses_in` says of the storage's runs.
    """
    stores = open_storage(storage_uri).child("tokens")
    if reference is None:
        keys = sorted(
            {
                entry.key.partition("/")[0]
                for entry in stores.list()
                if entry.key.endswith(f"/{MANIFEST}")
            }
        )
        if len(keys) != 1:
            uses = uses_in(open_storage(storage_uri))
            known = "; ".join(_described(stores.child(key), uses) for key in keys)
            raise TokenStoreError(
                f"name a token store: {f'there are {known}' if keys else f'{stores.uri} holds none'}"
            )
        return stores.child(keys[0])
    if "/" not in reference and stores.exists(f"{reference}/{MANIFEST}"):
        return stores.child(reference)
    return open_storage(reference.removesuffix(f"/{MANIFEST}"))


def _described(store: Storage, uses: Uses) -> str:
    """Returns the store's key, its sources, its date where it is on this machine, and what runs use
    it for."""
    sources = json.loads(store.find_bytes(SOURCES) or b"{}").get("sources", [])
    described = f"{store.uri.rpartition('/')[2]} of {', '.join(sources) or 'unknown sources'}"
    path = store.local_path(MANIFEST)
    made = f"made {date_of(path.stat().st_mtime)}" if path is not None else ""
    notes = [made, *uses.get(_identity(store), ())]
    shown = ", ".join(note for note in notes if note)
    return described + (f" ({shown})" if shown else "")


def _identity(store: Storage) -> str:
    """Returns what runs know the store by; an empty text for a store of another format or a damaged
    one."""
    with suppress(ValueError, KeyError, TypeError, TokenStoreError):
        return Manifest.from_json(store.read_bytes(MANIFEST)).identity
    return ""


def stats(store: Storage) -> dict[str, Any]:
    """Returns counts by split and source, and rates."""
    manifest = read_manifest(store)
    tokens, documents = manifest.total("tokens"), manifest.total("documents")
    num_dropped = sum(manifest.dropped.values())
    sources = json.loads(store.read_bytes(SOURCES))["sources"]
    return {
        "manifest_hash": manifest.hash,
        "documents": documents,
        "tokens": tokens,
        "bytes": manifest.total("bytes"),
        "bytes_per_token": round(manifest.total("bytes") / max(1, tokens - documents), 3),
        "tokens_per_document": round(tokens / max(1, documents), 1),
        "splits": {
            split: {name: manifest.total(name, split) for name in ("documents", "tokens", "bytes")}
            for split in SPLITS
        },
        "sources": [
            {
                "source": sources[number],
                "weight": round(manifest.weights[number], 4) if manifest.weights else None,
                "documents": sum(
                    shard.documents for shard in manifest.shards if shard.source == number
                ),
                "tokens": sum(shard.tokens for shard in manifest.shards if shard.source == number),
            }
            for number in sorted({shard.source for shard in manifest.shards})
        ],
        "shards": len(manifest.shards),
        "dtype": manifest.dtype.name,
        "vocab_size": manifest.vocab_size,
        "dropped": {reason: count for reason, count in manifest.dropped.items() if count},
        "drop_rate": round(num_dropped / max(1, num_dropped + documents), 4),
        "replaced_utf8": manifest.replaced_utf8,
    }


def report(store: Storage) -> dict[str, Any]:
    """Returns the dropped documents by reason: count, share, and the first few with file, place and
    front."""
    manifest = read_manifest(store)
    files = json.loads(store.read_bytes(SOURCES))["files"]
    total = sum(manifest.dropped.values()) + manifest.total("documents")
    return {
        "documents": manifest.total("documents"),
        "dropped": {
            reason: {
                "count": count,
                "share": round(count / max(1, total), 4),
                "samples": [
                    {
                        "file": files[found.file][0],
                        "offset": found.document,
                        "bytes": found.bytes,
                        "preview": found.preview,
                    }
                    for found in manifest.drop_samples.get(reason, [])
                ],
            }
            for reason, count in manifest.dropped.items()
            if count
        },
    }


def verify(store: Storage) -> dict[str, Any]:
    """Recomputes the hash of every shard, and of every table of the document map if there is one.
    Raises `TokenStoreError`, which names those that are altered."""
    manifest = read_manifest(store)
    problems = []
    itemsize = manifest.dtype.itemsize
    total = manifest.total("tokens") * itemsize / 1e6
    with ThreadPoolExecutor(_READERS) as pool, progress("verifying", total=total) as advance:
        hashes = pool.map(lambda shard: file_sha256(store, shard.file), manifest.shards)
        for shard, found in zip(manifest.shards, hashes, strict=True):
            advance(shard.tokens * itemsize / 1e6)
            if found != shard.sha256:
                problems.append(
                    f"{shard.file} has SHA-256 {found[:12]}…, the manifest says {shard.sha256[:12]}…"
                )
    if problems:
        raise TokenStoreError(
            f"{len(problems)} of {len(manifest.shards)} shards of {store.uri} are altered: {'; '.join(problems[:10])}; "
            "delete them and tokenize again, which makes the same bytes"
        )
    return {
        "valid": True,
        "manifest_hash": manifest.hash,
        "shards": len(manifest.shards),
        "document_tables": _verify_map(store, manifest),
    }


def _verify_map(store: Storage, manifest: Manifest) -> int:
    """Returns the number of tables of the document map, 0 without a map. Raises `TokenStoreError`
    for one that is altered or another store's."""
    if not store.exists(DOCUMENTS):
        return 0
    mapped = DocumentMap(store, manifest)
    with ThreadPoolExecutor(_READERS) as pool:
        problems = [*filter(None, pool.map(partial(problem_of, mapped), mapped.tables))]
    if problems:
        raise TokenStoreError(
            f"{len(problems)} of {len(mapped.tables)} tables of {store.uri}'s document map are not as recorded: "
            f"{'; '.join(problems[:10])}; delete them, and `raymill tokenize --documents` makes the same again"
        )
    return len(mapped.tables)
