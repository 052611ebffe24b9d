"""The memory that compiled grammars take, counted and bounded."""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

MOST_BYTES = 256 << 20  # of the grammars of one version
SMALL_PART = 64  # of them, which any grammar may have
SLOW_S = 0.0002  # for asking, where there are many free pieces: then it is done once in a while
_ONCE_IN = 200  # times as long


class GrammarMemory:
    """The memory of all grammars of an engine, in whichever thread they were compiled."""

    def __init__(self, most_bytes: int, *, make_room: Callable[[], None]) -> None:
        """`make_room` drops what nobody follows."""
        self.most_bytes = most_bytes
        self._make_room = make_room
        self._lock = threading.RLock()  # as a grammar may be collected at any moment
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes

    def has_room_for(self, num_bytes: int) -> bool:
        """Tells whether a grammar that takes so much may be followed on: only if that is little,
        where the memory is exceeded even without what nobody follows."""
        if self.num_bytes > self.most_bytes:
            self._make_room()
        return self.num_bytes <= self.most_bytes or num_bytes < self.most_bytes // SMALL_PART


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # bytes of large pieces
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),  # bytes of others
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


class _Heap:
    """Asks the C library how much it has given out."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._silent_until_s = 0.0

    def num_bytes(self) -> int | None:
        if time.perf_counter() < self._silent_until_s:
            return None
        began_s = time.thread_time()
        usage = self._ask()
        took_s = time.thread_time() - began_s
        if took_s > SLOW_S:
            self._silent_until_s = time.perf_counter() + _ONCE_IN * took_s
        return int(usage.uordblks + usage.hblkhd)


@cache
def _heap() -> _Heap | None:
    """Returns what can be asked, None where the C library is another or an old one."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    ask.restype = _Usage
    return _Heap(ask)


def heap_bytes() -> int | None:
    """Returns the bytes that this process has of the C library, None where they are not known."""
    heap = _heap()
    return None if heap is None else heap.num_bytes()
