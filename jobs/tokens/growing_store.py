"""Lists the sealed shards of a token store that is still being written, and waits for more of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Protocol, Self

from cluster.storage.uris import Storage
from jobs.corpus.chunks import Chunk
from jobs.tokens.token_store import MANIFEST, SEALED, Manifest, Shard, TokenStoreError, in_order, read_manifest


def newest_manifest(store: Storage) -> Manifest | None:
    """Returns the finished store's manifest, or else the sealed part's, or else None. Raises `TokenStoreError`."""
    if not store.exists(MANIFEST) and store.exists(SEALED):
        try:
            return read_manifest(store, name=SEALED)
        except TokenStoreError:
            if not store.exists(MANIFEST):  # otherwise the store was just finished, and SEALED removed
                raise
    return read_manifest(store) if store.exists(MANIFEST) else None


@dataclass(frozen=True)
class Clock:
    """The way to wait; tests inject another one."""

    poll_s: float = 1.0  # between looks at the store
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


class GrowingStore:
    """The part of a store that may be read now. `check` raises when nobody writes the store any longer."""

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
        """Returns the newest manifest, once `ready` holds for it or the store is finished."""
        if not self.manifest.complete and self._clock.now() - self._checked_at >= self._clock.poll_s:
            self._checked()
        while not (self.manifest.complete or ready(self.manifest)):
            manifest = newest_manifest(self.storage)
            if manifest is None or not _agree(self.manifest, manifest):
                raise TokenStoreError(f"{self.storage.uri} was replaced while it was read; start again")
            # A restarted writer lists the shards from the first one again.
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
    """Reports whether both are of one store, and a finished one holds all that was sealed."""
    return old.identity == new.identity and (not new.complete or set(old.shards) <= set(new.shards))


_WRITE_SHARE = 0.02  # of the time may go into rewriting the list, which grows with the store
_INTERVAL_S = 1.0


class WithShards(Protocol):
    """A chunk's result. The writer's own class comes with Ray Data, whose import would cost each process that trains
    1.2 s of processor time, as those of `raymill replay`."""

    @property
    def shards(self) -> Sequence[Shard]: ...


class SealedPrefix:
    """Keeps the stored list of sealed shards current, to a second or so, while results come in any order."""

    def __init__(
        self, store: Storage, manifest: Manifest, chunks: Sequence[Chunk], results: Mapping[int, WithShards]
    ) -> None:
        """`results` has those of ready shards, whose numbers follow the chunks', and gets one for each chunk."""
        self._store = store
        self._manifest = replace(manifest, complete=False)
        self._chunks = {
            source: [chunk.number for chunk in group]
            for source, group in groupby(chunks, key=lambda chunk: chunk.source)
        }
        self._ready, self._results = list(results), results
        self._write_after = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._write()

    def update(self) -> None:
        """Writes the list again, unless it was written just now."""
        if time.monotonic() >= self._write_after:
            started = time.monotonic()
            self._write()
            now = time.monotonic()
            self._write_after = now + max(_INTERVAL_S, (now - started) / _WRITE_SHARE)

    def _write(self) -> None:
        numbers = [*sealed_chunks(self._chunks, self._results), *self._ready]
        shards = in_order(shard for number in numbers for shard in self._results[number].shards)
        self._store.write_bytes(SEALED, replace(self._manifest, shards=shards).to_json())


def sealed_chunks(chunks: Mapping[int, Sequence[int]], done: Mapping[int, object]) -> list[int]:
    """Returns the chunks, in canonical order, that come before the first unfinished one of their source."""
    return [number for numbers in chunks.values() for number in takewhile(done.__contains__, numbers)]
