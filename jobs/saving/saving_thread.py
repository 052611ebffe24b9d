"""A thread that stores copies of the training state while training continues, and tries again while
storage is down.

One copy is being stored and at most one waits. Whatever storage does, training neither ends nor
waits, except for its last checkpoint.
"""

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import StorageError
from jobs.run.storage_retry import Outage

CopyT = TypeVar("CopyT")
BegunT = TypeVar("BegunT")


class SavingThread(ABC, Generic[CopyT, BegunT]):
    """The thread, which `finish` ends. `_changed` guards what it shares with the training
    thread."""

    def __init__(self, name: str, outage: Outage) -> None:
        self._outage = outage
        self._changed = threading.Condition()
        self._pending: CopyT | None = None
        self._begun: BegunT | None = None  # what is stored in part
        self._is_finishing = self._is_abandoned = self._is_storing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def _store(self) -> None:
        """Stores what has begun or is pending. Raises `StorageError` or `OSError`: it is called
        again."""

    def finish(self) -> None:
        """Returns once the last copy is stored. Raises `LeaseLostError`."""
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()

    def abandon(self) -> None:
        """Starts nothing more, and does not wait for the copy that is being stored."""
        with self._changed:
            self._pending, self._is_abandoned = None, True
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while self._has_work():
                self._is_storing = True
                try:
                    self._store()
                except LeaseLostError:
                    raise
                except (StorageError, OSError) as error:
                    wait_s = self._outage.failed(error)
                    with self._changed:  # a newer copy is worth a try at once
                        waiting = self._pending
                        self._changed.wait_for(lambda: self._pending is not waiting, timeout=wait_s)  # noqa: B023
                else:
                    self._outage.over()
                finally:
                    self._is_storing = False
        except BaseException as error:  # raised again in the training's thread
            self._failure = error

    def _has_work(self) -> bool:
        """Waits for work; returns False once there will be none."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._pending or self._begun or self._is_finishing or self._is_abandoned
            )
            return bool(self._pending or self._begun) and not self._is_abandoned
