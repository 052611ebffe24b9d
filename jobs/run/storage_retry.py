"""Retries storage that is out of reach for as long as it takes, and reports when it goes down and
when it is back.

Data on its way to the storage is kept in the node's spool.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import NotFoundError, Storage, StorageError

_log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 5.0

Result = TypeVar("Result")


def tell_nobody(event: str, **fields: Any) -> None:
    """Stands in for the ledger's `event` where there is no ledger to write: rank 0 alone has it."""


class Outage:
    """The outages that one writer meets."""

    def __init__(
        self, what: str, report: Callable[..., None], *, effect: str = "training continues"
    ) -> None:
        """`report` gets the events: ("storage_down", what=…, reason=…) and ("storage_back", what=…,
        tries=…)."""
        self._what, self._report, self._effect = what, report, effect
        self._tries = 0

    def failed(self, error: Exception) -> float:
        """Records a failed try, and returns the seconds to wait before the next one."""
        self._tries += 1
        if self._tries == 1:
            _log.warning("%s: the storage is down, %s: %s", self._what, self._effect, error)
            self._report("storage_down", what=self._what, reason=str(error))
        num_doublings = min(self._tries - 1, 20)  # 2 to the power of 1,100 fits no float
        return min(_FIRST_WAIT_S * 2**num_doublings, _LONGEST_WAIT_S)

    def over(self) -> None:
        """Records that the storage answered."""
        if self._tries:
            tries, self._tries = self._tries, 0
            _log.warning("%s: the storage is back after %d failed tries", self._what, tries)
            self._report("storage_back", what=self._what, tries=tries)


def patiently(call: Callable[[], Result], what: str) -> Result:
    """Retries the call while the storage is down; raises at once for a missing file or a lost
    lease."""
    outage = Outage(what, tell_nobody, effect="waiting for it")
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
    """Returns this node's and user's private folder for the run, the same in each process. Made if
    missing."""
    folder = Path(tempfile.gettempdir()) / f"raymill-spool-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user; remove it, or set TMPDIR")
    folder /= hashlib.sha256(run.uri.encode()).hexdigest()[:24]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
