"""`sealed.json` of a growing store: for each source, the shards up to the first that is missing."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby, takewhile
from types import TracebackType

from cluster.storage import Storage
from jobs.corpus_chunks import Chunk
from jobs.shard_writer import ChunkResult
from jobs.token_store import SEALED, Manifest

_WRITE_SHARE = 0.02  # of the time may go into rewriting the list, which grows with the store
_INTERVAL_S = 1.0


class SealedPrefix(AbstractContextManager["SealedPrefix"]):
    """Takes results in any order and keeps the list current, to a second or so."""

    def __init__(
        self, store: Storage, manifest: Manifest, chunks: Sequence[Chunk], *, ready: Mapping[int, ChunkResult]
    ) -> None:
        self._store = store
        self._manifest = replace(manifest, complete=False)
        self._chunks = {
            source: [chunk.number for chunk in group]
            for source, group in groupby(chunks, key=lambda chunk: chunk.source)
        }
        self._ready = list(ready)
        self._results = dict(ready)
        self._write_after = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()

    def add(self, chunk: int, result: ChunkResult) -> None:
        self._results[chunk] = result
        if time.monotonic() >= self._write_after:
            started = time.monotonic()
            self._write()
            now = time.monotonic()
            self._write_after = now + max(_INTERVAL_S, (now - started) / _WRITE_SHARE)

    def _write(self) -> None:
        numbers = [*sealed_chunks(self._chunks, self._results), *self._ready]
        shards = (shard for number in numbers for shard in self._results[number].shards)
        ordered = tuple(sorted(shards, key=lambda shard: shard.source))
        self._store.write_bytes(SEALED, replace(self._manifest, shards=ordered).to_json())


def sealed_chunks(chunks: Mapping[int, Sequence[int]], done: Mapping[int, object]) -> list[int]:
    """The chunks, in canonical order, that come before the first unfinished one of their source."""
    return [number for numbers in chunks.values() for number in takewhile(done.__contains__, numbers)]
