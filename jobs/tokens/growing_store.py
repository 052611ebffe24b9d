"""The manifest of a token store that may still be written: listing what is sealed so far, and waiting for more."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from types import TracebackType

from cluster.storage.uris import Storage
from jobs.corpus.chunks import Chunk
from jobs.tokens.shard_writer import ChunkResult
from jobs.tokens.token_store import MANIFEST, SEALED, Manifest, TokenStoreError, read_manifest


def newest_manifest(store: Storage) -> Manifest | None:
    """The finished store's manifest, or else what is sealed; None before anything is. Raises `TokenStoreError`."""
    if not store.exists(MANIFEST) and store.exists(SEALED):
        try:
            return read_manifest(store, name=SEALED)
        except TokenStoreError:
            if not store.exists(MANIFEST):  # otherwise the store was finished, and SEALED removed, just now
                raise
    return read_manifest(store) if store.exists(MANIFEST) else None


@dataclass(frozen=True)
class Clock:
    """How to wait."""

    poll_s: float = 1.0  # between looks at the store
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


class GrowingStore:
    """What a reader may read now. `check` raises when nobody writes the store any longer."""

    def __init__(self, storage: Storage, *, check: Callable[[], None], clock: Clock) -> None:
        self.storage = storage
        self._check, self._clock = check, clock
        self._checked_at = clock.now()
        manifest = newest_manifest(storage)
        while manifest is None:
            self._pause()
            manifest = newest_manifest(storage)
        self.manifest = manifest

    def wait_until(self, ready: Callable[[Manifest], bool]) -> Manifest:
        """The newest manifest, once `ready` holds for it or the store is finished."""
        if not self.manifest.complete and self._clock.now() - self._checked_at >= self._clock.poll_s:
            self._checked()
        while not (self.manifest.complete or ready(self.manifest)):
            manifest = newest_manifest(self.storage)
            if manifest is None or not _agree(self.manifest, manifest):
                raise TokenStoreError(f"{self.storage.uri} was replaced while it was read; start again")
            # A writer that was started again lists the shards anew, one by one.
            grown = manifest.complete or len(manifest.shards) > len(self.manifest.shards)
            self.manifest = manifest if grown else self.manifest
            if not grown:
                self._pause()
        return self.manifest

    def _pause(self) -> None:
        self._checked()
        self._clock.sleep(self._clock.poll_s)

    def _checked(self) -> None:
        self._check()
        self._checked_at = self._clock.now()


def _agree(old: Manifest, new: Manifest) -> bool:
    """Whether both are of one store, and the finished one holds all that was sealed."""
    return old.identity == new.identity and (not new.complete or set(old.shards) <= set(new.shards))


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
