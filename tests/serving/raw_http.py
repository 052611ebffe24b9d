"""Clients that write bytes to a socket."""

import contextlib
import socket
import time

from tests.time_limits import limit_s


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):  # it closed with our bytes unread
        while data := connection.recv(1 << 16):
            answer += data
    return answer


def drip(address: tuple[str, int], start: bytes, *, drop: bytes) -> tuple[float, bytes]:
    """Sends `start`, then `drop` again and again until the connection ends: after how long, and
    with which answer."""
    with socket.create_connection(address, timeout=0.1) as connection:
        began = time.monotonic()
        connection.sendall(start)
        answer = b""
        while time.monotonic() - began < limit_s(10):
            try:
                connection.sendall(drop)
                if not (data := connection.recv(1 << 16)):
                    break
                answer += data
            except TimeoutError:
                continue
            except ConnectionError:
                break
        return time.monotonic() - began, answer
