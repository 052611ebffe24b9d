"""Child processes: ended by the kernel when their parent is gone, however that went; found, and ended by name."""

import ctypes
import signal
from collections.abc import Sequence
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG = 1
_END_TIMEOUT_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """A `preexec_fn`: one system call, safe beside other threads. The parent is the thread that starts the child."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def with_descendants(pid: int) -> list[psutil.Process]:
    """The process and all below it; none where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and waits; psutil knows a process by its start too, so no other one of the same number is hit."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)
