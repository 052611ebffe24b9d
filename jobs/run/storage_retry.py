"""Retries storage that is out of reach for as long as it takes, and reports when it goes down and
when it is back.

Data on its way to the storage is kept in the node's spool.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cluster.output.progress import say_from_worker
from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import NotFoundError, Storage, StorageError

_log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 5.0

CHECKPOINTS, LEDGER_LINES = "checkpoints", "ledger"
"""The stored thing, as `storage_down` and `storage_back` name it."""

Result = TypeVar("Result")


def tell_nobody(event: str, **fields: Any) -> None:
    """Stands in for the ledger's `event` where there is no ledger to write: rank 0 alone has it."""


class Outage:
    """The outages that one writer meets. The person who watches is told of them by the ledger, or,
    where that cannot be, by the process itself."""

    def __init__(
        self, what: str, report: Callable[..., None], *, effect: str = "training continues"
    ) -> None:
        """`report` gets the events: ("storage_down", what=…, reason=…) and ("storage_back", what=…,
        tries=…)."""
        self._what, self._report, self._effect = what, report, effect
        is_told = report is not tell_nobody and what != LEDGER_LINES
        self._tell = _log.warning if is_told else say_from_worker
        self._tries = 0

    def failed(self, error: Exception) -> float:
        """Records a failed try, and returns the seconds to wait before the next one."""
        self._tries += 1
        if self._tries == 1:
            reason = _in_words(error)
            self._tell(f"{self._what}: the storage is down, {self._effect}: {reason}")
            self._report("storage_down", what=self._what, reason=reason)
        num_doublings = min(self._tries - 1, 20)  # 2 to the power of 1,100 fits no float
        return min(_FIRST_WAIT_S * 2**num_doublings, _LONGEST_WAIT_S)

    def over(self) -> None:
        """Records that the storage answered."""
        if self._tries:
            tries, self._tries = self._tries, 0
            self._tell(f"{self._what}: the storage is back after {tries} failed tries")
            self._report("storage_back", what=self._what, tries=tries)


class StoredPart:
    """How far a run's checkpoints are stored, from the lines of its ledger, in order."""

    def __init__(self) -> None:
        self.step = 0
        """The step of the checkpoint that was stored last."""
        self.refusal = ""
        """Why the storage refuses the next one; empty where it takes them."""

    def add(self, line: Mapping[str, Any]) -> None:
        match line.get("event"):
            case "checkpoint":
                self.step, self.refusal = line["step"], ""
            case "storage_down" if line["what"] == CHECKPOINTS:
                self.refusal = line["reason"]
            case "storage_back" if line["what"] == CHECKPOINTS:
                self.refusal = ""
            case "start":  # a new writer, which finds out by itself
                self.refusal = ""


def not_stored(lines: Iterable[Mapping[str, Any]]) -> str:
    """Says since which step the run of these lines has no checkpoint, and why; empty where the
    storage takes them."""
    stored = StoredPart()
    for line in lines:
        stored.add(line)
    return f"no checkpoint since step {stored.step:,}: {stored.refusal}" if stored.refusal else ""


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error)


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
