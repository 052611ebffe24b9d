"""Waits for the sealed shards of a token store that is still being written."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.storage.uris import Storage
from jobs.tokens.token_store import MANIFEST, SEALED, Manifest, TokenStoreError, read_manifest


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
