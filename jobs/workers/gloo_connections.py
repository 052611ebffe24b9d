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
    """A TCP connection of this process."""

    descriptor: int
    socket_id: str  # the kernel's, as the number of the descriptor may be used again


def open_connections(*, but_with: int) -> set[Connection]:
    """Returns this process's open TCP connections, but for those of which an end has the port `but_with`."""
    found = set()
    for entry in _DESCRIPTORS.iterdir():
        with suppress(OSError):  # it was closed meanwhile, or is no connection
            socket_id = str(entry.readlink())
            if socket_id.startswith("socket:") and but_with not in _ports(int(entry.name)):
                found.add(Connection(int(entry.name), socket_id))
    return found


def _ports(descriptor: int) -> tuple[int, int]:
    """Returns the ports of both ends. Raises `OSError` where the socket is no TCP connection."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        if end.family not in (socket.AF_INET, socket.AF_INET6) or end.type != socket.SOCK_STREAM:
            raise OSError(f"descriptor {descriptor} is no TCP connection")
        return end.getsockname()[1], end.getpeername()[1]


def cut(connections: Collection[Connection]) -> None:
    """Shuts down those of these connections that are still open. Their descriptors stay gloo's to close."""
    for connection in connections:
        with suppress(OSError):  # it was closed meanwhile
            if str((_DESCRIPTORS / str(connection.descriptor)).readlink()) == connection.socket_id:
                with socket.socket(fileno=os.dup(connection.descriptor)) as end:
                    end.shutdown(socket.SHUT_RDWR)
