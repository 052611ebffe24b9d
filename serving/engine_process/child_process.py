"""Starts a module as a process beside the replica, connected to it by one socket."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.settings.code_folders import CODE_ROOT
from model.errors import UserError

Child = tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]


async def start_child(
    module: str,
    arguments: Mapping[str, Any],
    *,
    threads: int,
    pass_fds: Sequence[int] = (),
    python: str = sys.executable,
) -> Child:
    """Returns the process and our end of its socket; it gets the other end as `--socket`. Arguments that are None are
    omitted. The process must end when the socket closes, as happens when the replica dies. Raises `UserError` if
    `python` cannot be run."""
    ours, theirs = socket.socketpair()
    given = {"--socket": theirs.fileno()} | {flag: value for flag, value in arguments.items() if value is not None}
    # Neither fork nor multiprocessing: both break inside a Ray worker.
    with theirs:
        try:
            process = subprocess.Popen(
                [python, "-m", module, *(str(word) for item in given.items() for word in item)],
                cwd=CODE_ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                pass_fds=[theirs.fileno(), *pass_fds],
            )
        except OSError as error:
            ours.close()
            raise UserError(f"cannot run {python}: {error.strerror}") from None
    return process, *await asyncio.open_connection(sock=ours)
