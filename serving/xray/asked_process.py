"""A process beside the replica that answers questions, one at a time, and ends after some idle
time."""

import asyncio
from collections.abc import Mapping
from typing import Any

from serving.engine_process.child_process import Child, kill_child, start_child

IDLE_S = 300.0


class AskedProcess:
    """Starts with the first question. It ends when its socket closes, and so when the replica
    dies."""

    def __init__(self, module: str, arguments: Mapping[str, Any]) -> None:
        """The process runs a module, which gets the arguments."""
        self._module, self._arguments = module, arguments
        self._child: Child | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def is_started(self) -> bool:
        """Whether it can answer at once."""
        return self._child is not None

    async def ask(self, question: bytes) -> tuple[int, bytes]:
        """Returns the status and the JSON body of the answer. Only one question may be asked at a
        time. Raises `ConnectionError` or `asyncio.IncompleteReadError` if it has ended."""
        if self._idle is not None:
            self._idle.cancel()
        child, self._child = self._child, None
        if child is None:
            child = await start_child(self._module, self._arguments)
        _, reader, writer = child
        try:
            writer.write(question + b"\n")
            status, _, body = (await reader.readuntil()).partition(b" ")
        except BaseException:
            # The rest of a half-read answer must not become the answer to the next request.
            kill_child(child)
            raise
        self._child = child
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)
        return int(status), body.rstrip()

    def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._child is not None:
            kill_child(self._child)
            self._child = None
