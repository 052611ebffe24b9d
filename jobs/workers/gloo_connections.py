"""Cuts gloo's connections, since its own abort leaves a message waiting for a worker that closes none.

A cut connection fails as if the other worker had closed it: whatever waits for it raises, in every thread.
"""

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_DESCRIPTORS = Path("/proc/self/fd")


class Connection(NamedTuple):
    """An open socket of this process."""

    descriptor: int
    socket_id: str  # the kernel's, as the number of the descriptor may be used again


def open_connections() -> set[Connection]:
    """Returns this process's open sockets."""
    found = set()
    for entry in _DESCRIPTORS.iterdir():
        with suppress(OSError):  # it was closed meanwhile
            target = str(entry.readlink())
            if target.startswith("socket:"):
                found.add(Connection(int(entry.name), target))
    return found


def cut(connections: Collection[Connection]) -> None:
    """Shuts down the TCP connections among these, for both ends; the descriptors stay gloo's to close."""
    for connection in open_connections() & set(connections):
        with suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM:
                end.getpeername()  # raises for one that listens
                end.shutdown(socket.SHUT_RDWR)
