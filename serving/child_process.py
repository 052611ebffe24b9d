"""Starts a module of this package as a process beside the replica, joined to it by one socket."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Child = tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]


async def start_child(
    module: str, arguments: Mapping[str, Any], *, threads: int, pass_fds: Sequence[int] = ()
) -> Child:
    """The process and this end of its socket, whose other end it gets as `--socket`. Arguments that are None are left
    out. It has to end when the socket closes, which it does with a replica that dies too."""
    ours, theirs = socket.socketpair()
    given = {"--socket": theirs.fileno()} | {flag: value for flag, value in arguments.items() if value is not None}
    # Neither fork nor multiprocessing: both break inside a Ray worker. The folder above this package is where `-m`
    # finds it.
    process = subprocess.Popen(
        [sys.executable, "-m", module, *(str(word) for item in given.items() for word in item)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        pass_fds=[theirs.fileno(), *pass_fds],
    )
    theirs.close()
    return process, *await asyncio.open_connection(sock=ours)
