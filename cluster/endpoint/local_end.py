"""Ends an endpoint of this machine without cutting its answers: tells its proxy to take nothing new, and waits.

The proxy listens under a name in Linux's abstract namespace, which follows from the endpoint's address, and obeys
processes of its own user only.
"""

import os
import socket
import struct
import time
from collections.abc import Callable

DRAIN, CUT = b"drain", b"cut"  # orders; the answer is the number of open requests
LONGEST_STREAM_S = 120.0  # for a replica that leaves, or an endpoint that ends, to finish its streams
POLL_S = 0.1
CUT_TIMEOUT_S = 5.0  # in which the streams that remain get their error event
LOG_S = 0.5  # in which the proxy writes its last lines
_ANSWER_TIMEOUT_S = 5.0
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def door_name(host: str, port: int) -> str:
    """Returns the name under which the proxy of an endpoint at this address takes orders."""
    return f"\0raymill-door-{host}-{port}"


def is_of_this_user(end: socket.socket) -> bool:
    """Tells whether the other end belongs to the same user; the abstract namespace has no permissions of its own."""
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    uid = _PEER_CREDENTIALS.unpack(raw)[1]
    return bool(uid == os.getuid())


def order(door: str, command: bytes) -> int:
    """Returns how many requests are open after an order. Raises `OSError` if no proxy answers."""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(_ANSWER_TIMEOUT_S)
        end.connect(door)
        if not is_of_this_user(end):
            raise ConnectionError("another user listens there")
        end.sendall(command + b"\n")
        answer = end.makefile("rb").readline()
    if not answer.endswith(b"\n"):
        raise ConnectionError("the proxy has ended")
    return int(answer)


def drain(door: str, *, on_open: Callable[[int], None], longest_s: float = LONGEST_STREAM_S) -> int:
    """Waits until all answers are whole, for `longest_s` at most; then ends the others with an error event. Calls
    `on_open` once if there are any. Returns how many were cut; 0 also if no proxy answers, since then none is left."""
    deadline_s = time.monotonic() + longest_s
    try:
        if num_open := order(door, DRAIN):
            on_open(num_open)
        while num_open and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            num_open = order(door, DRAIN)
    except OSError:
        return 0
    if num_open:
        cut(door)
    time.sleep(LOG_S)
    return num_open


def cut(door: str) -> None:
    """Ends all answers with an error event at once."""
    deadline_s = time.monotonic() + CUT_TIMEOUT_S
    try:
        while order(door, CUT) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    except OSError:
        return
    time.sleep(LOG_S)
