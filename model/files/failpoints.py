"""Named places where a test may stop the process: RAYMILL_FAILPOINT=NAME:NTH:exit|sleep|raise.

The NTH time the process passes the place, it dies as if by SIGKILL, sleeps forever, or gets an
`OSError`. RAYMILL_FAILPOINT=NAME:SHARE:flip makes a share of what the place computes wrong in one
bit, as a device does that corrupts silently; with flip_nth only the NTH is, and with flip_from all
from the NTH on. With stick it is the same bit of the same value each time, so that the same mistake
is repeated. In place of flip, nan makes the first value no number, huge one whose square is none,
and one a 1, which shows in whatever is computed of it.
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
_VALUES = {"nan": math.nan, "huge": 1e30, "one": 1.0}
_FLIPS = ("flip", _STICKS, *_VALUES)

_counting = threading.Lock()
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Does nothing unless the variable names this place."""
    armed = os.environ.get(VARIABLE, "")
    if not armed.startswith(f"{name}:"):
        return
    _, nth, action = armed.split(":")
    if _kind(action) in _FLIPS or _count(armed) != int(nth):
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
                f"{VARIABLE} ends in {action!r}, expected exit, sleep, raise, stick, or flip, nan, huge or one, also "
                "with _nth or _from"
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
        return _count(armed) == int(when)
    if action.endswith("_from"):
        return _count(armed) >= int(when)
    return action in _FLIPS and random.SystemRandom().random() < float(when)


def sticks(name: str) -> bool:
    """Reports whether what the place computes is wrong in the same bit each time."""
    armed = os.environ.get(VARIABLE, "")
    return armed.startswith(f"{name}:") and armed.endswith(f":{_STICKS}")


def value(name: str) -> float | None:
    """Returns what the first value that the place computes is to be, where it is to be wrong in
    more than a bit."""
    armed = os.environ.get(VARIABLE, "")
    return _VALUES.get(_kind(armed.rpartition(":")[2])) if armed.startswith(f"{name}:") else None


def _kind(action: str) -> str:
    """Returns an action without what says when."""
    return action.partition("_")[0]


def _count(armed: str) -> int:
    """Returns how often the process has passed the place by now."""
    with _counting:
        _passed[armed] = _passed.get(armed, 0) + 1
        return _passed[armed]
