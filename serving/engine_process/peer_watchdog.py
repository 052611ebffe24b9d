"""Lets replica and engine process watch each other. Each kills the other if it hangs: Ray notices a
dead process at once, but a stopped one only after half a minute."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable

import psutil

BEAT_S = 0.5
STOPPED_S = 3.0  # without a beat or any CPU time for so long: stopped by a signal, or frozen
# Without a beat although it computes: its interpreter never runs the thread that beats
SILENT_S = 30.0
READ_BYTES = 1 << 12


def is_hung(*, silent_s: float, idle_s: float) -> bool:
    """Returns whether a process hangs that gave no sign of life for `silent_s` and used no CPU time
    for `idle_s`. A process that waits for a busy processor gets some time within seconds, a stopped
    one gets none."""
    return silent_s >= SILENT_S or idle_s >= STOPPED_S


class Silence:
    """Measures how long the other side has given no sign while this side was able to notice one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_look_s = clock()
        self.seconds = 0.0

    def observe(self, *, sign: bool) -> None:
        """Records a check, one each `BEAT_S`. A longer pause was on our side (a machine that slept,
        a starved thread) and counts as one."""
        now_s = self._clock()
        self.seconds = 0.0 if sign else self.seconds + min(now_s - self._last_look_s, 2 * BEAT_S)
        self._last_look_s = now_s


def watch_peer(line: socket.socket, *, peer_pid: int) -> None:
    """Beats on `line` from its own thread, as the other end does, and kills a peer that hangs. The
    thread beats during steps and prompts of any length, since torch computes without Python's
    lock."""
    line.setblocking(False)
    threading.Thread(
        target=_watch, args=(line, psutil.Process(peer_pid)), daemon=True, name="watchdog"
    ).start()


def _watch(line: socket.socket, peer: psutil.Process) -> None:
    silence, idleness, last_cpu_s = Silence(), Silence(), _cpu_s(peer)
    with line:
        while True:
            try:
                heard = _exchange(line)
                cpu_s = _cpu_s(peer)
            except (EOFError, ConnectionError, psutil.NoSuchProcess):
                return
            silence.observe(sign=heard)
            idleness.observe(sign=heard or cpu_s > last_cpu_s)
            last_cpu_s = cpu_s
            if is_hung(silent_s=silence.seconds, idle_s=idleness.seconds):
                sys.stderr.write(
                    f"process {peer.pid} has given no sign of life for {silence.seconds:.1f} s: killed\n"
                )
                peer.kill()
                return
            time.sleep(BEAT_S)


def _exchange(line: socket.socket) -> bool:
    """Sends a beat, and returns whether any arrived. Raises `EOFError` when the other end is
    closed."""
    with contextlib.suppress(BlockingIOError):  # nobody reads
        line.send(b".")
    try:
        if not line.recv(READ_BYTES):
            raise EOFError
    except BlockingIOError:
        return False
    return True


def _cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])  # user and system
