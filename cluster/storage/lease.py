"""One writer at a time: a lease is an object that its holder rewrites every few seconds, on any
storage.

Conditional writes alone create, renew, take over and remove it, so of two contenders one wins. A
contender judges by its own monotonic clock how long the object stays the same; no two machines'
clocks are compared. A holder that was stopped and continues finds another's version: `check()`,
called before anything is published, raises then.
"""

import json
import logging
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Self

from cluster.storage.interface import (
    AlreadyExistsError,
    ConflictError,
    Storage,
    StorageError,
    join_uri,
)
from cluster.storage.process_identity import ProcessIdentity

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.25  # between looks for a sign of life


class LeaseHeldError(StorageError):
    """Another process holds the lease and is alive."""


class LeaseLostError(StorageError):
    """The lease was taken over, as this process did not renew it in time; it may write nothing
    more."""


@dataclass(frozen=True)
class Holder(ProcessIdentity):
    """The stored content: a process, with a random `owner`; `host` and `since` are for people."""

    owner: str
    generation: int  # grows by one at each take-over
    host: str
    since: str
    beat: int = 0


class Lease:
    """Held inside the `with` block, once. Raises `LeaseHeldError` on entry, within about
    `timeout_s`.

    A dead holder's lease is taken over: at once if it ran on this machine, else after `timeout_s`
    without a sign of life. An outage of the storage loses the lease only if another process takes
    it meanwhile.
    """

    def __init__(
        self,
        storage: Storage,
        key: str = "RUNNING",
        *,
        interval_s: float = 2.0,
        timeout_s: float = 10.0,
    ) -> None:
        if not 0 < 2 * interval_s <= timeout_s:
            raise ValueError(
                f"timeout_s is {timeout_s}, expected at least twice interval_s, {interval_s}"
            )
        self._storage = storage
        self._key = key
        self._uri = join_uri(storage.uri, key)
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._me = Holder(
            **asdict(ProcessIdentity.of()),
            owner=secrets.token_hex(8),
            generation=1,
            host=socket.gethostname(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )
        self._version = ""
        self._lost: LeaseLostError | None = None
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {key}", daemon=True)

    @property
    def generation(self) -> int:
        """Is 1 for the first holder, and one more at each take-over."""
        return self._me.generation

    def __enter__(self) -> Self:
        while not self._acquired():
            pass
        self._heart.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._released.set()
        # The next run takes over a lease that cannot be removed: no reason to fail one that ended
        # well.
        with self._renewing, suppress(StorageError):
            if self._lost is None:
                self._storage.delete(self._key, if_version=self._version)

    def check(self) -> None:
        """Renews the lease, which proves that it is held. Raises `LeaseLostError`, or
        `StorageError` in an outage."""
        with self._renewing:
            if self._lost is None:
                self._renew()
            if self._lost is not None:
                raise self._lost

    def _acquired(self) -> bool:
        """Tries once; returns False if another process was faster. Raises `LeaseHeldError`."""
        self._me = replace(self._me, generation=1)
        try:
            self._version = self._storage.write_bytes(self._key, _stored(self._me), if_absent=True)
            return True
        except AlreadyExistsError:
            found = _held(self._storage, self._key)
        if found is None:
            return False
        holder, version = found
        # The answer to our own write was lost, and its retry refused
        if holder.owner == self._me.owner:
            self._me, self._version = found
            return True
        if _is_renewed(self._storage, self._key, found, timeout_s=self._timeout_s):
            raise LeaseHeldError(
                f"{self._uri} is held by process {holder.pid} on {holder.host} since {holder.since}; wait until it "
                f"ends, or stop it: a holder that died is replaced after {self._timeout_s:g} s"
            )
        self._me = replace(self._me, generation=holder.generation + 1)
        with suppress(ConflictError):
            self._version = self._storage.write_bytes(
                self._key, _stored(self._me), if_version=version
            )
            return True
        return False

    def _beat(self) -> None:
        is_out_of_reach = False  # which is said once
        while not self._released.wait(self._interval_s):
            with self._renewing:
                if self._released.is_set() or self._lost is not None:
                    return
                try:
                    self._renew()
                except (
                    StorageError
                ) as error:  # out of reach: until another process writes, the lease is ours
                    if not is_out_of_reach:
                        _LOG.warning("the lease cannot be renewed, and is tried again: %s", error)
                    is_out_of_reach = True
                else:
                    if is_out_of_reach:
                        _LOG.warning("the lease %s is renewed again", self._uri)
                    is_out_of_reach = False

    def _renew(self) -> None:
        self._me = replace(self._me, beat=self._me.beat + 1)
        try:
            self._version = self._storage.write_bytes(
                self._key, _stored(self._me), if_version=self._version
            )
        except ConflictError:
            found = _held(self._storage, self._key)
            if found is not None and found[0].owner == self._me.owner:
                self._version = found[1]  # of our own write, whose answer was lost
                return
            other = (
                f"process {found[0].pid} on {found[0].host}"
                if found
                else "a process that has ended since"
            )
            self._lost = LeaseLostError(
                f"{self._uri} was taken over by {other}, as this process, {self._me.pid} on {self._me.host}, was "
                f"silent for over {self._timeout_s:g} s; nothing was published, run again once the other has ended"
            )


def living_holder(storage: Storage, key: str, *, timeout_s: float) -> Holder | None:
    """Returns the lease's living holder: at once on its own machine, else at its next beat within
    `timeout_s`."""
    found = _held(storage, key)
    if found is None:
        return None
    holder = found[0]
    is_alive = not holder.is_gone() and (
        holder.is_here or _is_renewed(storage, key, found, timeout_s=timeout_s)
    )
    return holder if is_alive else None


def _is_renewed(storage: Storage, key: str, found: tuple[Holder, str], *, timeout_s: float) -> bool:
    """Says whether the holder renews its lease within `timeout_s`: not if its process is gone, or
    the lease."""
    holder, version = found
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and not holder.is_gone():
        time.sleep(min(_LOOK_S, timeout_s / 20))
        entry = storage.stat(key)
        if entry is None or entry.version != version:
            return entry is not None
    return False


def _held(storage: Storage, key: str) -> tuple[Holder, str] | None:
    """Returns the holder and the version of its lease; None if there is none. A damaged lease has
    no owner."""
    content, version = read_with_version(storage, key)
    if version is None:
        return None
    try:
        return Holder(**json.loads(content)), version
    except (ValueError, TypeError):  # cut off by a power loss: it is watched and then replaced
        return Holder(
            "", 0, 0.0, owner="", generation=0, host="an unknown host", since="an unknown time"
        ), version


def read_with_version(storage: Storage, key: str) -> tuple[bytes, str | None]:
    """Returns content and version of one and the same write; no bytes and None if there is no such
    file."""
    while (entry := storage.stat(key)) and (content := storage.find_bytes(key)) is not None:
        if storage.stat(key) == entry:
            return content, entry.version
    return b"", None


def _stored(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()
