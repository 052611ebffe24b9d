"""Named places where a test may stop the process: RAYMILL_FAILPOINT=NAME:NTH:exit|sleep|raise.

The NTH time the process passes the place, it dies as if by SIGKILL, sleeps forever, or gets an
`OSError`.
"""

import os
import threading
import time

VARIABLE = "RAYMILL_FAILPOINT"

_counting = threading.Lock()
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Does nothing unless the variable names this place."""
    armed = os.environ.get(VARIABLE, "")
    if not armed.startswith(f"{name}:"):
        return
    _, nth, action = armed.split(":")
    with _counting:
        _passed[armed] = _passed.get(armed, 0) + 1
        if _passed[armed] != int(nth):
            return
    match action:
        case "exit":
            os._exit(137)
        case "sleep":
            time.sleep(1e6)
        case "raise":
            raise OSError(f"failpoint {name}")
        case _:
            raise ValueError(f"{VARIABLE} ends in {action!r}, expected exit, sleep or raise")
