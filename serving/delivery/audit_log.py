"""Records each /admin order and its result, as lines of JSON in the storage, beside the endpoint's
state."""

import json
import logging
from contextlib import suppress
from typing import Any

from cluster.settings.serve import ServeConfig
from cluster.storage.lease import read_with_version
from cluster.storage.registry import AUDIT
from cluster.storage.uris import (
    AlreadyExistsError,
    ConflictError,
    StorageError,
    join_uri,
    open_storage,
)
from serving.delivery.delivery_file import endpoint_name

MAX_ENTRIES = 1000  # older ones go; an entry is about 500 bytes
MAX_TRIES = 10  # while other replicas add entries too

_log = logging.getLogger(__name__)


class AuditLog:
    """Each replica adds what it was asked. Methods block."""

    def __init__(self, config: ServeConfig) -> None:
        self._storage = open_storage(config.storage.uri)
        self._key = f"{AUDIT}{endpoint_name(config)}.jsonl"

    def add(self, entry: dict[str, Any]) -> None:
        """Adds an entry. If the storage does not take it, the program's log has it: no order fails
        for that."""
        line = json.dumps(entry)
        try:
            for _ in range(MAX_TRIES):
                stored, version = read_with_version(self._storage, self._key)
                data = b"".join(
                    one + b"\n" for one in [*stored.splitlines()[1 - MAX_ENTRIES :], line.encode()]
                )
                with suppress(AlreadyExistsError, ConflictError):
                    self._storage.write_bytes(
                        self._key, data, if_absent=version is None, if_version=version
                    )
                    return
            raise StorageError(f"others have written there {MAX_TRIES} times meanwhile")
        except StorageError as error:
            _log.error("not in %s: %s (%s)", join_uri(self._storage.uri, self._key), line, error)

    def read(self) -> list[dict[str, Any]]:
        """Returns all entries, the oldest first. Raises `StorageError`."""
        return [
            json.loads(line) for line in read_with_version(self._storage, self._key)[0].splitlines()
        ]
