"""Which process a number means, also after a restart of the machine, whether it is still there, and how it ends."""

import ctypes
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_TRUSTED_START_S = 2.0
"""Two readings of one process's start differ by rounding; a new process has not got the old one's number so soon."""


@dataclass(frozen=True)
class ProcessIdentity:
    """`machine` is the boot and the process namespace in which the pid means something, empty if unknown; `started_s`
    counts from the machine's boot, which a change of the wall clock leaves as it is."""

    machine: str
    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        return cls(_this_machine(), pid, _started_s(psutil.Process(pid)))

    @classmethod
    def own(cls) -> "ProcessIdentity":
        return cls.of(os.getpid())

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, so that its number means the same here."""
        return bool(self.machine) and self.machine == _this_machine()

    def is_gone(self) -> bool:
        """Whether it ran on this machine and has ended; False if that cannot be known."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            is_other = abs(_started_s(process) - self.started_s) > _TRUSTED_START_S
            return is_other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _this_machine() -> str:
    """Containers on one host may share its name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}" if boot.exists() else ""


def _started_s(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


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
