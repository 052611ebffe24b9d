"""Remembers requests that have ended as many replicas as one may, so that a client in a loop does
not end them all."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

QUARANTINE_S = 600.0
MAX_REQUESTS = 1000


class Quarantine:
    """One proxy's memory: hashes of paths and bodies."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_s: OrderedDict[bytes, float] = OrderedDict()

    def add(self, path: str, body: bytes) -> None:
        self._ends_s[_digest(path, body)] = self._clock() + QUARANTINE_S
        if len(self._ends_s) > MAX_REQUESTS:
            self._ends_s.popitem(last=False)

    def __contains__(self, request: tuple[str, bytes]) -> bool:
        if not self._ends_s:  # as nearly always: nothing is hashed
            return False
        return self._clock() < self._ends_s.get(_digest(*request), 0.0)


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b"\0" + body).digest()
