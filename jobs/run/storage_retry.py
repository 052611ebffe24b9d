"""Storage that is out of reach: tried again for as long as it takes, and told of when it goes and when it is back.

What has yet to be brought there is kept in the node's spool.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import NotFoundError, Storage, StorageError

_log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 5.0

Result = TypeVar("Result")


class Outage:
    """The outages that one writer meets."""

    def __init__(self, what: str, tell: Callable[..., None], *, effect: str = "training goes on") -> None:
        """`tell` is called as tell("storage_down", what=…, reason=…) and tell("storage_back", what=…, tries=…)."""
        self._what, self._tell, self._effect = what, tell, effect
        self._tries = 0

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next try."""
        self._tries += 1
        if self._tries == 1:
            _log.warning("%s: the storage is down, %s: %s", self._what, self._effect, error)
            self._tell("storage_down", what=self._what, reason=str(error))
        return min(_FIRST_WAIT_S * 2 ** (self._tries - 1), _LONGEST_WAIT_S) if self._tries < 20 else _LONGEST_WAIT_S

    def over(self) -> None:
        """The storage answered."""
        if self._tries:
            tries, self._tries = self._tries, 0
            _log.warning("%s: the storage is back after %d failed tries", self._what, tries)
            self._tell("storage_back", what=self._what, tries=tries)


def patiently(call: Callable[[], Result], what: str) -> Result:
    """The result of the call, once the storage gives it. What is not there, or not ours any more, is raised at once."""
    outage = Outage(what, lambda name, **fields: None, effect="it is waited for")
    while True:
        try:
            result = call()
        except (NotFoundError, LeaseLostError):
            raise
        except (StorageError, OSError) as error:
            threading.Event().wait(outage.failed(error))
        else:
            outage.over()
            return result


def node_spool(run: Storage) -> Path:
    """A folder of this node and user alone, the same for each process that works at the run. Made if missing."""
    folder = Path(tempfile.gettempdir()) / f"raymill-spool-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user; remove it, or set TMPDIR")
    folder /= hashlib.sha256(run.uri.encode()).hexdigest()[:24]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
