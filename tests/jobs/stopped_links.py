"""Stops TCP connections without closing them, as a cable does that is pulled: whatever arrives is
dropped."""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_SO_ATTACH_FILTER = 26  # of Linux; needs no rights
# One instruction of BPF: return 0 bytes of the packet
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
_PIDFD_GETFD = 438

Link = tuple[int, int]
"""The ports of a connection on this host, that of the process at this end first."""


def links(pid: int) -> Iterator[tuple[Link, socket.socket]]:
    """Yields a process's connections over TCP. Another one's need the right to trace it."""
    process, system_call = os.pidfd_open(pid), ctypes.CDLL(None, use_errno=True).syscall
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if not str(path.readlink()).startswith("socket:"):
                continue
        except FileNotFoundError:  # closed meanwhile
            continue
        copy = system_call(_PIDFD_GETFD, process, int(path.name), 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), f"{path} cannot be shared")
        connection = socket.socket(fileno=copy)
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            continue
        try:
            local, remote = connection.getsockname(), connection.getpeername()
        except OSError:  # not connected
            continue
        yield (local[1], remote[1]), connection
    os.close(process)


def stop_between(first: int, second: int) -> int:
    """Stops all connections between two processes at both ends, for good; returns how many ends
    there are."""
    program = ctypes.create_string_buffer(_DROP_ALL)
    option = struct.pack("HL", 1, ctypes.addressof(program))
    ends = {link: connection for pid in (first, second) for link, connection in links(pid)}
    num_stopped = 0
    for (local, remote), connection in ends.items():
        if (remote, local) in ends:
            connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
            num_stopped += 1
    return num_stopped
