"""Starts a module as a process beside the replica, connected to it by one socket."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.settings.code_folders import CODE_ROOT
from model.errors import UserError

MAX_LINE_BYTES = 1 << 30  # of what it sends; the log-probabilities of a prompt are some megabytes


class Child(NamedTuple):
    """A process, and our end of its socket."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def start_child(
    module: str,
    arguments: Mapping[str, Any],
    *,
    private: Mapping[str, Any] | None = None,
    pass_fds: Sequence[int] = (),
    python: str = sys.executable,
) -> Child:
    """Returns the process and our end of its socket. Its argument is a JSON object: `arguments`,
    with the `threads` it computes with, and the other end as `socket`. `private`, which may hold
    secrets, is the first line on the socket instead, since every user of the machine sees command
    lines. The process must end when the socket closes, as when the replica dies. Raises `UserError`
    if `python` cannot be run."""
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
    child = Child(process, *await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))
    if private is not None:
        child.writer.write(json.dumps(private).encode() + b"\n")
    return child


def kill_child(child: Child) -> None:
    """Kills a process that holds nothing that could be lost. Waiting for it takes too little time
    for a thread."""
    child.writer.close()
    child.process.kill()
    child.process.wait()
