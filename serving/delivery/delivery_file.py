"""The state of an endpoint in the storage: one file, whole or replaced, and never overwritten by an older one.

Fencing. Several coordinators may believe that the endpoint is theirs: both clusters of a RayService during an upgrade
call themselves by the same `deployment`, and one that was cut off comes back. So the file, `endpoints/NAME.json`, names
who wrote it (a random `incarnation` of each coordinator's process) and how often it was written (`generation`, one more
each time):

1. Each write replaces exactly the version of the file that its writer has built on (a conditional write). The first
   one therefore wins, and every other coordinator finds a conflict.
2. On a conflict the file is read again. Where it has the writer's own incarnation, the answer to an earlier write was
   lost: it writes again. Where another incarnation of the same deployment has a higher generation, nothing is written:
   `NewerStateError` carries the newer state, which the coordinator adopts. Where another deployment has it, a
   coordinator that has not begun replaces it (an endpoint that is started anew), and one that has begun stops writing.
3. The file pins the checkpoints of the state that it holds, so whoever adopts a state also keeps its pins.

A file that cannot be read (truncated, or edited by hand) is not the end: each write leaves a copy of what it stored in
`endpoints/last-good/`. A coordinator that starts continues with that copy, and one that runs with its own state; the
next write replaces the damaged file.
"""

import json
import logging
import secrets
from typing import Any, NamedTuple

from pydantic import ValidationError

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import ENDPOINTS, LAST_GOOD, endpoint_state
from cluster.storage.uris import AlreadyExistsError, ConflictError, NotFoundError, Storage, StorageError, join_uri
from serving.delivery.promotion import Delivery

_log = logging.getLogger(__name__)


class DamagedStateError(StorageError):
    """The file is there and holds no state."""


class NewerStateError(StorageError):
    """Another coordinator of this deployment has stored `state` since this one last read or wrote."""

    def __init__(self, message: str, state: Delivery) -> None:
        super().__init__(message)
        self.state = state


class Stored(NamedTuple):
    """The content of the file."""

    incarnation: str  # of the coordinator that wrote it; "" in files of older versions
    generation: int  # how many writes there were
    state: Delivery


def endpoint_name(config: ServeConfig) -> str:
    """The name of an endpoint's file."""
    return config.delivery.endpoint or f"{config.host}-{config.port}".replace(":", ".")


class DeliveryFile:
    """One coordinator's view of the file. Its methods block, and are called one at a time."""

    def __init__(self, storage: Storage, name: str, *, deployment: str) -> None:
        self.uri = join_uri(storage.uri, f"{ENDPOINTS}{name}.json")
        self._storage = storage
        self._key, self._copy_key = f"{ENDPOINTS}{name}.json", f"{LAST_GOOD}{name}.json"
        self._deployment = deployment
        self._incarnation = secrets.token_hex(8)
        self._generation = 0
        self._version: str | None = None  # of the file that the next write replaces; None where there is none
        self._has_begun = False  # whether this deployment's state was read or written here

    def restore(self) -> Delivery | None:
        """Returns what this deployment served last, and None for a new one. Raises `StorageError`: not to know what is
        live is worse than to wait for the storage. Raises `DamagedStateError` where the copy does not help either."""
        entry = self._storage.stat(self._key)
        if entry is None:
            return None
        self._version = entry.version
        is_damaged = False
        try:
            stored = self._read(self._key)
        except DamagedStateError as error:
            stored, is_damaged = self._copy(error), True
        self._generation = stored.generation
        if stored.state.deployment != self._deployment:
            return None
        self._has_begun = True
        return self._repaired(stored.state) if is_damaged else stored.state

    def _repaired(self, state: Delivery) -> Delivery:
        try:
            self.write(state)
        except NewerStateError as error:  # another coordinator was faster
            return error.state
        except StorageError as error:  # the next change tries it again
            _log.warning("the damaged file is not replaced yet: %s", error)
        return state

    def write(self, state: Delivery) -> None:
        """Stores the state. Raises `NewerStateError` and `StorageError`, and has changed nothing then."""
        try:
            data = self._write(state)
        except (AlreadyExistsError, ConflictError):
            self._look_again()
            data = self._write(state)
        self._generation += 1
        self._has_begun = True
        try:
            self._storage.write_bytes(self._copy_key, data)
        except StorageError as error:
            _log.warning("the state of this endpoint is stored, but no copy of it: %s", error)

    def _write(self, state: Delivery) -> bytes:
        content = {
            "pinned": [version.checkpoint for version in state.known],
            "incarnation": self._incarnation,
            "generation": self._generation + 1,
            "delivery": state.model_dump(mode="json"),
        }
        data = json.dumps(content).encode()
        is_new = self._version is None
        self._version = self._storage.write_bytes(self._key, data, if_absent=is_new, if_version=self._version)
        return data

    def _look_again(self) -> None:
        """After a conflict: returns where the next write may replace what is there."""
        entry = self._storage.stat(self._key)
        if entry is None:
            _log.warning("%s was removed; it is written again", self.uri)
            self._version = None
            return
        try:
            stored = self._read(self._key)
        except DamagedStateError as error:
            _log.error("%s; this coordinator replaces it by the state that it holds", error)
            self._version = entry.version
            return
        if stored.state.deployment != self._deployment:
            if self._has_begun:
                raise StorageError(
                    f"another endpoint keeps its state in {self.uri}; give each its own name with --delivery.endpoint"
                )
        elif stored.incarnation != self._incarnation and stored.generation > self._generation:
            self._version, self._generation, self._has_begun = entry.version, stored.generation, True
            raise NewerStateError(
                f"another coordinator of this endpoint has stored a newer state in {self.uri} (write "
                f"{stored.generation}, live is {stored.state.live.checkpoint}); this coordinator continues with it",
                stored.state,
            )
        self._version = entry.version
        self._generation = max(self._generation, stored.generation)

    def _copy(self, damage: DamagedStateError) -> Stored:
        try:
            stored = self._read(self._copy_key)
        except (DamagedStateError, NotFoundError):
            raise damage from None
        _log.error(
            "%s; this coordinator continues with the copy of the last good state, write %d, and replaces it",
            damage,
            stored.generation,
        )
        return stored

    def _read(self, key: str) -> Stored:
        """Raises `DamagedStateError`, and `NotFoundError` where there is none."""
        uri = join_uri(self._storage.uri, key)
        try:
            content: dict[str, Any] = endpoint_state(self._storage.read_bytes(key))
            generation, incarnation = int(content.get("generation", 0)), str(content.get("incarnation", ""))
            state = Delivery.model_validate_json(json.dumps(content["delivery"]))
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise DamagedStateError(
                f"the state in {uri} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:200]}): restore "
                "the file from a backup, or delete it, upon which the endpoint begins with the checkpoint of its "
                "settings"
            ) from None
        return Stored(incarnation, generation, state)
