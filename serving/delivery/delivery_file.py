"""Keeps the state of an endpoint in one file in the storage, which no older state ever overwrites.

Fencing. Several coordinators may consider the endpoint theirs: both clusters of a RayService during
an upgrade have the same `deployment`, and one that was cut off comes back. So the file,
`endpoints/NAME.json`, names its writer (a random `incarnation` for each coordinator's process) and
counts its writes (`generation`):

1. Each write replaces exactly the version of the file that its writer has built on (a conditional write). So the first
   one wins, and every other coordinator gets a conflict.
2. After a conflict the file is read again. If it has the writer's own incarnation, the answer to an earlier write was
   lost, and it writes again. If another incarnation of the same deployment has a higher generation, nothing is written:
   `NewerStateError` carries the newer state, which the coordinator adopts. If it belongs to another deployment, a
   coordinator that has not begun replaces it (the endpoint was restarted), and one that has begun stops writing.
3. The file pins the checkpoints of its state, so a coordinator that adopts a state also keeps its pins.

Each write leaves a copy in `endpoints/last-good/`. If the file cannot be read (truncated, or edited
by hand), a coordinator that starts continues with that copy, one that runs with its own state, and
the next write replaces the file.
"""

import logging
import secrets

from pydantic import ValidationError

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import ENDPOINTS, LAST_GOOD
from cluster.storage.uris import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    Storage,
    StorageError,
    join_uri,
)
from serving.delivery.promotion import Delivery, PromotionRecord

_log = logging.getLogger(__name__)


class DamagedDeliveryError(StorageError):
    """The file exists but holds no state."""


class NewerStateError(StorageError):
    """Another coordinator of this deployment has stored `state` since this one last read or
    wrote."""

    def __init__(self, message: str, state: Delivery) -> None:
        super().__init__(message)
        self.state = state


class Stored(PromotionRecord):
    """The content of the file."""

    incarnation: str  # of the coordinator that wrote it
    generation: int  # the number of writes so far
    pinned: list[str]  # the checkpoints that a run's retention keeps
    delivery: Delivery


def endpoint_name(config: ServeConfig) -> str:
    """Returns the name of an endpoint's file."""
    return config.delivery.endpoint or f"{config.host}-{config.port}".replace(":", ".")


class DeliveryFile:
    """One coordinator's view of the file. Its methods block, and run one at a time."""

    def __init__(self, storage: Storage, name: str, *, deployment: str) -> None:
        self.uri = join_uri(storage.uri, f"{ENDPOINTS}{name}.json")
        self._storage = storage
        self._key, self._copy_key = f"{ENDPOINTS}{name}.json", f"{LAST_GOOD}{name}.json"
        self._deployment = deployment
        self._incarnation = secrets.token_hex(8)
        self._generation = 0
        # Of the file that the next write replaces; None if there is no file
        self._version: str | None = None
        self._has_begun = False  # whether this deployment's state was read or written here
        self.is_damaged = False  # whether `restore` read the copy instead of the file

    def restore(self) -> Delivery | None:
        """Returns what this deployment served last, or None for a new one. Raises `StorageError`,
        because waiting for the storage is better than not knowing what is live, and
        `DamagedDeliveryError` if the copy does not help either."""
        entry = self._storage.stat(self._key)
        if entry is None:
            return None
        self._version = entry.version
        try:
            stored = self._read(self._key)
        except DamagedDeliveryError as error:
            stored, self.is_damaged = self._copy(error), True
        self._generation = stored.generation
        if stored.delivery.deployment != self._deployment:
            return None
        self._has_begun = True
        return stored.delivery

    def write(self, state: Delivery) -> None:
        """Stores the state. Raises `NewerStateError` or `StorageError`, and then has changed
        nothing."""
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
        content = Stored(
            incarnation=self._incarnation,
            generation=self._generation + 1,
            pinned=state.pinned,
            delivery=state,
        )
        data = content.model_dump_json().encode()
        is_new = self._version is None
        self._version = self._storage.write_bytes(
            self._key, data, if_absent=is_new, if_version=self._version
        )
        return data

    def _look_again(self) -> None:
        """Reads the file after a conflict. Returns if the next write may replace it."""
        entry = self._storage.stat(self._key)
        if entry is None:
            _log.warning("%s was removed; it is written again", self.uri)
            self._version = None
            return
        try:
            stored = self._read(self._key)
        except DamagedDeliveryError as error:
            _log.error("%s; this coordinator replaces it with its own state", error)
            self._version = entry.version
            return
        is_ours = stored.delivery.deployment == self._deployment
        if self._has_begun and not is_ours:
            raise StorageError(
                f"another endpoint keeps its state in {self.uri}; give each its own name with --delivery.endpoint"
            )
        is_newer = stored.generation > self._generation
        self._version, self._generation = entry.version, max(self._generation, stored.generation)
        if is_ours and is_newer and stored.incarnation != self._incarnation:
            self._has_begun = True
            raise NewerStateError(
                f"another coordinator of this endpoint has stored a newer state in {self.uri} (write "
                f"{stored.generation}, live is {stored.delivery.live.checkpoint}); this coordinator continues with it",
                stored.delivery,
            )

    def _copy(self, damage: DamagedDeliveryError) -> Stored:
        try:
            stored = self._read(self._copy_key)
        except (DamagedDeliveryError, NotFoundError):
            raise damage from None
        _log.error(
            "%s; this coordinator continues with the copy of the last good state, write %d, and replaces it",
            damage,
            stored.generation,
        )
        return stored

    def _read(self, key: str) -> Stored:
        """Reads a file. Raises `DamagedDeliveryError`, or `NotFoundError` if there is none."""
        try:
            return Stored.model_validate_json(self._storage.read_bytes(key))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            uri = join_uri(self._storage.uri, key)
            raise DamagedDeliveryError(
                f"the state in {uri} is damaged ({problem[:200]}): restore the file from a backup, or delete it to "
                "begin with the checkpoint of the endpoint's settings"
            ) from None
