"""Processes by identity: which one a number means, even after a reboot, whether it is alive, and
how it ends."""

import ctypes
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_TRUSTED_START_S = 2.0
"""Two readings of a process's start differ by rounding; a number is not reused so soon."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process: `machine` is the boot and process namespace in which its pid is valid, empty if
    unknown; `started_s` counts from the boot, so a change of the wall clock does not matter."""

    machine: str
    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int | None = None) -> "ProcessIdentity":
        """Returns the identity of a process, by default this one."""
        process = psutil.Process(pid)
        return cls(_this_machine(), process.pid, _started_s(process))

    @property
    def is_here(self) -> bool:
        """Says whether it ran on this machine, where its pid is valid."""
        return bool(self.machine) and self.machine == _this_machine()

    def is_gone(self) -> bool:
        """Says whether it ran on this machine and has ended; False if that cannot be known."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            is_other = abs(_started_s(process) - self.started_s) > _TRUSTED_START_S
            return is_other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _this_machine() -> str:
    """Returns an id that differs even between containers, which may share their host's name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return (
        f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
        if boot.exists()
        else ""
    )


def _started_s(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


_PR_SET_PDEATHSIG = 1
_END_TIMEOUT_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Binds a child to the thread that starts it. As a `preexec_fn` it is one system call, safe
    with threads."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def with_descendants(pid: int) -> list[psutil.Process]:
    """Returns the process and all its descendants; none if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kills and waits; psutil also compares start times, so a reused pid is not hit."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)
