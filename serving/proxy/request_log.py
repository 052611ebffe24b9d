"""The request log: a line of JSON for each request, written after its end. It has neither text nor
keys.

Lines are written together, a moment later and in a thread: a disk that hangs must not stop every
stream of a proxy.
"""

import asyncio
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import orjson

FIELDS = (
    "time",  # when the request came
    "request_id",
    "key",  # its name
    "route",
    "stream",
    "model_version",
    "status",
    "reason",
    "prompt_tokens",
    "completion_tokens",
    "queue_s",
    "first_token_s",
    "total_s",
    "attempts",  # replicas that were asked
    "trace_id",
)
"""The fields of a line, in order."""
STDOUT = "-"
WRITE_AFTER_S = 0.2
MAX_WAITING_LINES = 10_000  # 4 MB; further ones are dropped, and counted in the program's own log
MAX_FILE_BYTES = 64 << 20  # then the file is renamed to NAME.1, which replaces the one before

_EMPTY = dict.fromkeys(FIELDS)
_log = logging.getLogger(__name__)

LogRequest = Callable[..., None]
"""Takes a request's fields by name."""


class RequestLog:
    def __init__(self, target: str) -> None:
        """`target` is a file, or `-` for standard output."""
        self._target = target
        self._lines: list[bytes] = []
        self._num_dropped = 0
        self._writing: asyncio.Task[None] | None = None

    def add(self, **fields: Any) -> None:
        """Takes a request's fields; missing ones are null."""
        if len(self._lines) >= MAX_WAITING_LINES:
            self._num_dropped += 1
            return
        self._lines.append(orjson.dumps(_EMPTY | fields, option=orjson.OPT_APPEND_NEWLINE))
        if self._writing is None:
            # In a context of its own: what it logs belongs to no request.
            self._writing = asyncio.get_running_loop().create_task(
                self._write_soon(), context=Context()
            )

    async def _write_soon(self) -> None:
        while self._lines:
            await asyncio.sleep(WRITE_AFTER_S)
            lines, self._lines = self._lines, []
            try:
                await asyncio.to_thread(_write, self._target, b"".join(lines))
            except OSError as error:
                _log.error("%d lines of the request log are lost: %s", len(lines), error)
            if self._num_dropped:
                _log.error(
                    "%d lines of the request log are lost: %s is too slow",
                    self._num_dropped,
                    self._target,
                )
                self._num_dropped = 0
        self._writing = None


def no_log(**_: Any) -> None:
    """Logs no request."""


def _write(target: str, data: bytes) -> None:
    """Appends whole lines, and puts a file aside that has become large. It is opened each time, so
    that it may be moved away at any moment."""
    if target == STDOUT:
        with open(1, "wb", closefd=False) as lines:
            lines.write(data)
        return
    with open(_opened_alone(target), "wb") as lines:
        about = os.fstat(lines.fileno())
        lines.write(data)
        lines.flush()
        if stat.S_ISREG(about.st_mode) and about.st_size + len(data) > MAX_FILE_BYTES:
            Path(target).replace(f"{target}.1")


def _opened_alone(target: str) -> int:
    """Returns a descriptor to append to. A machine's proxies write to one file, which each has to
    itself until it is closed: two that put it aside together would lose the one that the first has
    put aside."""
    while True:
        file = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), Path(target).stat()):
                return file
        os.close(file)  # another one has put it aside meanwhile
