"""Ends an endpoint of this machine without cutting its answers: tells its proxies to take nothing
new, and waits.

Each proxy listens under a name in Linux's abstract namespace, which begins with the endpoint's
address and ends with the proxy's process id, and obeys processes of its own user only.
"""

import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DRAIN, CUT = b"drain", b"cut"  # orders; the answer is the number of open requests
# For a replica that leaves, or an endpoint that ends, to finish its streams
LONGEST_STREAM_S = 120.0
POLL_S = 0.1
CUT_TIMEOUT_S = 5.0  # in which the streams that remain get their error event
LOG_S = 0.5  # in which the proxies write their last lines
_ANSWER_TIMEOUT_S = 5.0
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def entrance_of(host: str, port: int) -> str:
    """Returns how the names begin under which the proxies of an endpoint at this address take
    orders."""
    return f"raymill-door-{host}-{port}"


def door_of(entrance: str, pid: int) -> str:
    """Returns the name under which one proxy takes orders."""
    return f"\0{entrance}-{pid}"


def doors_at(entrance: str) -> list[str]:
    """Returns the names under which proxies take orders now; none where there is no Linux."""
    table = Path("/proc/net/unix")
    if not table.exists():
        return []
    start = f"@{entrance}-"  # the kernel shows the zero byte as an @
    names = {line.rpartition(" ")[2] for line in table.read_text(errors="replace").splitlines()}
    return sorted(
        "\0" + name[1:]
        for name in names
        if name.startswith(start) and name[len(start) :].isdecimal()
    )


def is_of_this_user(end: socket.socket) -> bool:
    """Tells whether the other end belongs to the same user; the abstract namespace has no
    permissions of its own."""
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


def order_all(entrance: str, command: bytes) -> int:
    """Returns how many requests are open in all proxies after an order. One that has ended, or ends
    now, has none."""
    num_open = 0
    for door in doors_at(entrance):
        with suppress(OSError):
            num_open += order(door, command)
    return num_open


def drain(
    entrance: str, *, on_open: Callable[[int], None], longest_s: float = LONGEST_STREAM_S
) -> int:
    """Waits until all answers are whole, for `longest_s` at most; then ends the others with an
    error event. Calls `on_open` once if there are any. Returns how many were cut; 0 also if no
    proxy answers, since then none is left."""
    deadline_s = time.monotonic() + longest_s
    if not doors_at(entrance):
        return 0
    if num_open := order_all(entrance, DRAIN):
        on_open(num_open)
    while num_open and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        num_open = order_all(entrance, DRAIN)  # a proxy that was started meanwhile hears of it, too
    if num_open:
        cut(entrance)
    time.sleep(LOG_S)
    return num_open


def cut(entrance: str) -> None:
    """Ends all answers with an error event at once."""
    deadline_s = time.monotonic() + CUT_TIMEOUT_S
    while order_all(entrance, CUT) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    time.sleep(LOG_S)
