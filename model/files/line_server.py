"""A process that answers lines: each one that it gets is a question and gets a line.

Its first argument is a JSON object, whose `socket` is the file descriptor of its end of a socket.
It ends when the other end closes, and so with the process that has started it.
"""

import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any


def own_arguments() -> dict[str, Any]:
    """Returns what this process was told."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    return arguments


class LineServer:
    """Sends lines to the process that has started this one, and answers the lines that come from
    it."""

    def __init__(
        self, descriptor: int, *, niceness: int = 0, limits: Mapping[int, int] | None = None
    ) -> None:
        """Bounds this process: `limits` are bytes by their number in `resource`."""
        os.nice(niceness)
        for number, num_bytes in (limits or {}).items():
            resource.setrlimit(number, (num_bytes, num_bytes))
        self._connection = socket.socket(fileno=descriptor)

    def send(self, line: bytes) -> None:
        """Sends a line, which has no end of its own."""
        self._connection.sendall(line + b"\n")

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answers lines, one at a time. Returns once the other end has closed."""
        with contextlib.suppress(ConnectionError), self._connection.makefile("rb") as lines:
            for line in lines:
                self.send(answer(line))


def with_status(status: int, body: bytes) -> bytes:
    """Returns an answer of HTTP's kind as a line."""
    return b"%d %b" % (status, body)
