"""Starts a module as a process beside the replica, connected to it by one socket."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.settings.code_folders import CODE_ROOT
from raymill.errors import UserError

MAX_LINE_BYTES = 1 << 30  # of what it sends; the log-probabilities of a prompt are some megabytes


class Child(NamedTuple):
    """A process, and our end of its socket."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Lines(asyncio.Protocol):
    """Hands on the lines of a process as they arrive. A stream of asyncio would wake a task for
    each."""

    def __init__(
        self, on_lines: Callable[[list[bytes]], None], *, on_end: Callable[[], None]
    ) -> None:
        """`on_end` is called once the socket is closed; a line that has not arrived whole is
        dropped."""
        self._on_lines = on_lines
        self._on_end = on_end
        self._pieces: list[bytes] = []  # of a line that has not arrived whole

    def data_received(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        if lines and self._pieces:
            lines[0] = b"".join((*self._pieces, lines[0]))
            self._pieces.clear()
        if rest:
            self._pieces.append(rest)
        if lines:
            self._on_lines(lines)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()


async def start_child(
    module: str, arguments: Mapping[str, Any], *, python: str = sys.executable
) -> Child:
    """Returns a process of `start_process`, and streams over our end of its socket."""
    process, ours = start_process(module, arguments, python=python)
    return Child(process, *await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))


def start_process(
    module: str,
    arguments: Mapping[str, Any],
    *,
    pass_fds: Sequence[int] = (),
    python: str = sys.executable,
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Returns the process and our end of its socket. Its argument is a JSON object: `arguments`,
    with the `threads` it computes with, and the other end as `socket`. The process must end when
    the socket closes, as when the replica dies. Raises `UserError` if `python` cannot be run."""
    ours, theirs = socket.socketpair()
    # Neither fork nor multiprocessing: both break inside a Ray worker.
    with theirs:
        try:
            process = subprocess.Popen(
                [python, "-m", module, json.dumps({"socket": theirs.fileno(), **arguments})],
                cwd=CODE_ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(arguments["threads"])},
                pass_fds=[theirs.fileno(), *pass_fds],
            )
        except OSError as error:
            ours.close()
            raise UserError(f"cannot run {python}: {error.strerror}") from None
    return process, ours


def kill_child(child: Child) -> None:
    """Kills a process that holds nothing that could be lost. Waiting for it takes too little time
    for a thread."""
    child.writer.close()
    child.process.kill()
    child.process.wait()
