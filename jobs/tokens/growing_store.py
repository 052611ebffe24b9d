"""Lists the sealed shards of a token store that is still being written, and waits for more of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Protocol

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
    """A store that is read while it is written. `check` raises when nobody writes it any longer."""

    def __init__(self, storage: Storage, *, check: Callable[[], None], clock: Clock) -> None:
        self._storage, self._check, self._clock = storage, check, clock
        self._checked_at = clock.now()

    def next_manifest(self, old: Manifest | None) -> Manifest:
        """Waits until more shards are sealed than the old manifest has, or the store is finished. Without an old one it
        returns the first that there is."""
        while True:
            new = newest_manifest(self._storage)
            if old is not None and (new is None or not _agree(old, new)):
                raise TokenStoreError(f"{self._storage.uri} was replaced while it was read; start again")
            # A restarted writer lists the shards from the first one again.
            if new is not None and (old is None or new.complete or len(new.shards) > len(old.shards)):
                return new
            self._check()
            self._checked_at = self._clock.now()
            self._clock.sleep(self._clock.poll_s)

    def check(self) -> None:
        """Notices a failed writer, also where no read has to wait."""
        if self._clock.now() - self._checked_at >= self._clock.poll_s:
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

    def update(self) -> None:
        """Writes the list again, unless it was written just now."""
        started = time.monotonic()
        if started < self._write_after:
            return
        sealed = [n for numbers in self._chunks.values() for n in takewhile(self._results.__contains__, numbers)]
        shards = in_order(shard for number in [*sealed, *self._ready] for shard in self._results[number].shards)
        self._store.write_bytes(SEALED, replace(self._manifest, shards=shards).to_json())
        now = time.monotonic()
        self._write_after = now + max(_INTERVAL_S, (now - started) / _WRITE_SHARE)
