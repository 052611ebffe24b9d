"""Builds the trace index of a token store, with the same bytes for any number of processes and
after interruptions.

Sections of the store send the windows that they choose to the parts of the index; then each part is
sorted. All of it goes through the store, so that a build which was ended goes on where it was.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.output.progress import say
from cluster.storage.lease import Lease
from cluster.storage.uris import Storage
from jobs.cleaning.disk_buckets import BucketFile, Records
from jobs.cleaning.exchange import Exchange, Runner, Section, partitions_for, run_step, step_results
from jobs.cleaning.exchange import Piece as SentPiece
from jobs.tokens.shard_reader import Piece, read_piece
from jobs.tokens.shard_writer import file_sha256
from jobs.tokens.token_store import Manifest, read_manifest
from jobs.trace.trace_index import (
    INDEX,
    TRACE,
    IndexList,
    Part,
    TraceIndexError,
    bytes_for,
    keys_of,
    part_bytes,
    part_content,
    read_list,
)
from jobs.trace.windows import GROUP_WINDOWS, LEAST_SPAN, chosen_windows, plain_ids

_RECORD = np.dtype([("hash", "<u8"), ("place", "<u8")])
_SECTION_TOKENS = 1 << 24
_MOST_SECTIONS = 1024
_READ_TOKENS = 1 << 20  # at once: 50 MB of hashes and what leads to them
_PART_BYTES = 64 << 20  # of records; sorting takes four times as much memory


class _PlacedPiece(NamedTuple):
    place: int  # of its first token in the store
    piece: Piece


def index_store(store: Storage, *, run: Runner) -> dict[str, Any]:
    """Makes the index of a finished store, or finds it there. `run` does the tasks.

    Raises `UserError`, and `LeaseHeldError` while another process makes it.
    """
    described = found_index(store)
    if described is not None:
        return described
    manifest = read_manifest(store)
    with Lease(store.child(TRACE)) as lease:
        return _described(store, manifest, _build(store, manifest, lease, run))


def found_index(store: Storage) -> dict[str, Any] | None:
    """Describes the index of a finished store, whose parts are verified; returns None where it has
    no whole one. Raises `UserError` for a store that is not finished."""
    manifest = read_manifest(store)
    listed = _finished(store, manifest)
    return None if listed is None else _described(store, manifest, listed)


def _described(store: Storage, manifest: Manifest, listed: IndexList) -> dict[str, Any]:
    num_tokens = manifest.total("tokens")
    return {
        "store": store.uri,
        "manifest_hash": manifest.hash,
        "tokens": num_tokens,
        "windows": listed.entries,
        "parts": len(listed.parts),
        "bytes": listed.num_bytes,
        "bytes_per_token": round(listed.num_bytes / max(1, num_tokens), 2),
    }


def _finished(store: Storage, manifest: Manifest) -> IndexList | None:
    """Returns the list of the store's own index where each part is there as it was made."""
    try:
        listed = read_list(store)
    except TraceIndexError:
        return None
    if listed is None or listed.manifest_hash != manifest.hash:
        return None
    trace = store.child(TRACE)
    for part in listed.parts:
        num_bytes = part_bytes(part.entries, listed.place_bytes)
        if not _is_stored(trace, part, num_bytes):
            say(f"{trace.uri}/{part.file} is missing or altered: the index is made again")
            return None
    return listed


def _is_stored(trace: Storage, part: Part, num_bytes: int) -> bool:
    entry = trace.stat(part.file)
    if entry is None or entry.size != num_bytes:
        return False
    return file_sha256(trace, part.file) == part.sha256


def _build(store: Storage, manifest: Manifest, lease: Lease, run: Runner) -> IndexList:
    num_tokens = manifest.total("tokens")
    place_bytes = bytes_for(num_tokens)
    trace, folder = store.child(TRACE), manifest.hash[:12]
    trace.delete(INDEX)
    sections = _sections(manifest)
    # As many windows as are chosen of random tokens
    num_windows = 2 * num_tokens // (GROUP_WINDOWS + 1)
    num_parts = partitions_for(num_windows * _RECORD.itemsize, task_bytes=_PART_BYTES)
    sent = Exchange(trace, f"{folder}/sent", len(sections), num_parts)
    pieces = partial(_records, store=store, dtype=manifest.dtype, border=manifest.eot_id)
    run_step("choosing windows", sections, partial(sent.send, pieces=pieces), run=run)
    lease.check()
    work = partial(_store_part, sent=sent, folder=folder, place_bytes=place_bytes)
    parts: dict[str, Part] = {}
    for content in step_results("sorting windows", range(num_parts), work, run=run):
        part = Part(**json.loads(content))
        parts[part.file] = part
    lease.check()
    listed = IndexList(manifest.hash, place_bytes, tuple(parts[file] for file in sorted(parts)))
    trace.write_bytes(INDEX, listed.to_json())
    _sweep(trace, kept=parts.keys() | {INDEX, "RUNNING"})
    return listed


def _sections(manifest: Manifest) -> list[Section]:
    """Cuts the store, its shards end to end, into sections of equal numbers of tokens."""
    total = manifest.total("tokens")
    size = max(_SECTION_TOKENS, -(-total // _MOST_SECTIONS))
    sections: list[Section] = []
    for number in range(-(-total // size)):
        sections.append(Section(number, []))
    place = 0
    for shard in manifest.shards:
        start = 0
        while start < shard.tokens:
            number = (place + start) // size
            end = min(shard.tokens, (number + 1) * size - place)
            placed = _PlacedPiece(place + start, Piece(shard, start, end))
            sections[number] = Section(number, [*sections[number].chunks, placed])
            start = end
        place += shard.tokens
    return sections


def _records(
    section: Section,
    exchange: Exchange,
    *,
    store: Storage,
    dtype: np.dtype[Any],
    border: int,
) -> Iterator[SentPiece]:
    """Yields the chosen windows of a section, part after part."""
    with BucketFile(_RECORD, num_buckets=exchange.num_partitions) as buckets:
        for placed in section.chunks:
            for records in _records_of(placed, store, dtype, border):
                buckets.add(records)
        yield from buckets.pieces()


def _records_of(
    placed: _PlacedPiece, store: Storage, dtype: np.dtype[Any], border: int
) -> Iterator[Records]:
    """Yields the windows that the groups choose which begin in a piece."""
    shard, first, last = placed.piece
    for start in range(first, last, _READ_TOKENS):
        end = min(last, start + _READ_TOKENS)
        read_end = min(shard.tokens, end + LEAST_SPAN - 1)
        content = read_piece(store, Piece(shard, start, read_end), dtype)
        ids = plain_ids(np.frombuffer(content, dtype))
        places, hashes = chosen_windows(ids, border=border)
        records = np.empty(len(places), _RECORD)
        records["hash"] = hashes
        records["place"] = places + (placed.place + start - first)
        yield records


def _store_part(number: int, *, sent: Exchange, folder: str, place_bytes: int) -> bytes:
    """Stores a part of the index, unless it is there; returns how the list has it, as JSON."""
    file = f"{folder}/part-{number:05d}.idx"
    received = np.concatenate([*sent.received(number, _RECORD)])
    # The records come in the order of their places, and a stable sort keeps it
    order = np.argsort(keys_of(received["hash"]), kind="stable")
    records = received[order]
    del received, order
    # A window at the border of two sections is chosen by both
    is_new = np.ones(len(records), np.bool_)
    is_new[1:] = records[1:] != records[:-1]
    records = records[is_new]
    content = part_content(keys_of(records["hash"]), records["place"], place_bytes=place_bytes)
    digest = hashlib.sha256()
    for table in content:
        digest.update(table)
    part = Part(file, len(records), digest.hexdigest())
    if not _is_stored(sent.store, part, sum(map(len, content))):
        with tempfile.TemporaryDirectory(prefix="raymill-trace-") as temporary:
            path = Path(temporary, "part")
            with path.open("wb") as written:
                written.writelines(content)
            sent.store.upload_file(path, file)
    return json.dumps(asdict(part)).encode()


def _sweep(trace: Storage, *, kept: set[str]) -> None:
    """Deletes what led to the index, and what is left of another store's."""
    for entry in trace.list():
        if entry.key not in kept:
            trace.delete(entry.key)
    trace.abort_uploads()
