"""A process that answers lines, one at a time, within bounds of processor time: for what a stranger
has written."""

import asyncio
from collections.abc import Awaitable, Callable

from serving.engine_process.child_process import Child, kill_child


class ExceededError(Exception):
    """The process used more than it may, and was ended."""


class ClosedError(Exception):
    """Nothing is asked any more."""


async def next_line(child: Child, *, within_s: float) -> bytes:
    """Returns what the process says next. Raises `ExceededError` if it says nothing, and kills
    it."""
    try:
        async with asyncio.timeout(within_s):
            return await child.reader.readuntil()
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        kill_child(child)
        raise ExceededError from None


class BoundedProcess:
    """Starts with the first line, and is replaced after one that exceeds the bounds. It ends when
    its socket closes, and so when the replica dies."""

    def __init__(self, begin: Callable[[], Awaitable[Child]]) -> None:
        """`begin` starts the process and hears what it says first."""
        self._begin = begin
        self._child: Child | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    async def start(self) -> None:
        """Raises what `begin` does."""
        self._child = await self._begin()

    async def ask(self, line: bytes, *, within_s: float) -> bytes:
        """Returns its answer to a line. Raises `ExceededError`, `ClosedError`, and what `begin`
        does."""
        async with self._turn:
            if self._is_closed:
                raise ClosedError
            if self._child is None:
                await self.start()
            assert self._child is not None
            try:
                self._child.writer.write(line + b"\n")
                answer = await next_line(self._child, within_s=within_s)
            except BaseException:  # the rest of a half-read answer must not become the next one's
                self._end()
                raise
            if self._child.process.poll() is not None:
                self._end()
            return answer

    def close(self) -> None:
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if self._child is not None:
            kill_child(self._child)
            self._child = None
