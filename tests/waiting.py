"""Waits for a condition, no longer than a limit that is scaled to the machine."""

import asyncio
import time
from collections.abc import Callable

from tests.time_limits import limit_s


def wait_until(
    condition: Callable[[], object],
    *,
    timeout_s: float = 60.0,
    poll_s: float = 0.05,
    why: Callable[[], object] = lambda: "the condition did not come true",
) -> float:
    """Returns how many seconds the condition took to come true; fails with `why()` after
    `limit_s(timeout_s)`."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + limit_s(timeout_s), why()
        time.sleep(poll_s)
    return time.monotonic() - start_s


async def wait_in_loop_until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Waits as `wait_until` does, while the event loop keeps running."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + limit_s(timeout_s), "the condition did not come true"
        await asyncio.sleep(0.01)
