"""Scales every time limit of the tests to the machine: limits are written in seconds of a quiet
reference machine.

A limit ends a test that hangs; it judges no speed. So each gets a headroom, as load may rise after
the measurement and the tests load the machine themselves, and is multiplied by how much slower than
the reference this machine was when the session began. The processes of one session share that
factor by an environment variable, by which it can also be given: `RAYMILL_TEST_SLOWNESS=10 make
test`.
"""

import os
import subprocess
import sys
import time

_VARIABLE = "RAYMILL_TEST_SLOWNESS"
_HEADROOM = 4.0
_MAX_PROCESSES = 8
# A process start and a spin of one thread, which shows a slow core; one for each core, which shows
# busy cores.
_SPIN = "x = 1\nfor _ in range(2_000_000): x = x * 1103515245 + 12345 & 0xFFFFFFFF"
_REFERENCE_S = 0.25  # of an AMD EPYC (Zen 4) with two cores and nothing else to do


def limit_s(quiet_s: float) -> float:
    """Returns the seconds that a test should wait here for what takes well under `quiet_s` on a
    quiet machine."""
    return quiet_s * _HEADROOM * slowness()


def slowness() -> float:
    """Returns how much slower than the reference this machine was when the session began, at least
    1."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = f"{max(1.0, _probe_s() / _REFERENCE_S):.1f}"
    return float(os.environ[_VARIABLE])


def _probe_s() -> float:
    num_processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
    start_s = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", _SPIN]) for _ in range(num_processes)
    ]
    for process in processes:
        process.wait()
    return time.monotonic() - start_s
