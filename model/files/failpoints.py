"""Named places where a test may stop the process: RAYMILL_FAILPOINT=NAME:NTH:exit|sleep|raise.

The NTH time the process passes the place, it dies as if by SIGKILL, sleeps forever, or gets an
`OSError`. RAYMILL_FAILPOINT=NAME:SHARE:flip makes a share of what the place computes wrong in one
bit, as a device does that corrupts silently; with flip_nth only the NTH is. With stick it is the
same bit of the same value each time, so that the same mistake is repeated. With nan and nan_nth the
first value is no number, and with huge and huge_nth it is one whose square is none.
RAYMILL_FAILPOINT=NAME:FILE:pause makes it wait at the place, each time, for as many seconds as the
file says, while there is that file.
"""

import math
import os
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "RAYMILL_FAILPOINT"

_STICKS = "stick"
_VALUES = {"nan": math.nan, "nan_nth": math.nan, "huge": 1e30, "huge_nth": 1e30}
_FLIPS = ("flip", "flip_nth", _STICKS, *_VALUES)

_counting = threading.Lock()
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Does nothing unless the variable names this place."""
    armed = os.environ.get(VARIABLE, "")
    if not armed.startswith(f"{name}:"):
        return
    _, nth, action = armed.split(":")
    if action in _FLIPS or not _is_nth(armed, int(nth)):
        return
    match action:
        case "exit":
            os._exit(137)
        case "sleep":
            time.sleep(1e6)
        case "raise":
            raise OSError(f"failpoint {name}")
        case _:
            raise ValueError(
                f"{VARIABLE} ends in {action!r}, expected exit, sleep, raise, flip, flip_nth, stick, nan, "
                "nan_nth, huge or huge_nth"
            )


def pause(name: str) -> None:
    """Does nothing unless the variable names this place and a file that says how long to wait."""
    armed = os.environ.get(VARIABLE, "")
    if armed.startswith(f"{name}:") and armed.endswith(":pause"):
        with suppress(FileNotFoundError):
            time.sleep(float(Path(armed.split(":")[1]).read_text(encoding="ascii")))


def flips(name: str) -> bool:
    """Reports whether this time what the place computes is to be wrong in a bit."""
    armed = os.environ.get(VARIABLE, "")
    if not armed.startswith(f"{name}:"):
        return False
    _, when, action = armed.split(":")
    if action.endswith("_nth"):
        return _is_nth(armed, int(when))
    return action in _FLIPS and random.SystemRandom().random() < float(when)


def sticks(name: str) -> bool:
    """Reports whether what the place computes is wrong in the same bit each time."""
    armed = os.environ.get(VARIABLE, "")
    return armed.startswith(f"{name}:") and armed.endswith(f":{_STICKS}")


def value(name: str) -> float | None:
    """Returns what the first value that the place computes is to be, where it is to be wrong in
    more than a bit."""
    armed = os.environ.get(VARIABLE, "")
    return _VALUES.get(armed.rpartition(":")[2]) if armed.startswith(f"{name}:") else None


def _is_nth(armed: str, nth: int) -> bool:
    with _counting:
        _passed[armed] = _passed.get(armed, 0) + 1
        return _passed[armed] == nth
