"""Takes the orders of the process that ends this endpoint: nothing new comes in, answers finish, or
are cut.

Without it the end of a proxy would look like clients that leave: their connections are gone, and no
stream says why.
"""

import asyncio
import logging
import socket
import threading
from typing import Protocol

from cluster.endpoint.local_end import CUT, DRAIN, is_of_this_user

_log = logging.getLogger(__name__)


class Cuttable(Protocol):
    """A request whose answer can be ended."""

    def cut(self) -> None: ...


class Doorkeeper:
    """Knows the open requests of one proxy, and whether it takes more."""

    def __init__(self) -> None:
        self.is_ending = False
        self._open: set[Cuttable] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self, request: Cuttable) -> None:
        self._loop = asyncio.get_running_loop()
        self._open.add(request)

    def leave(self, request: Cuttable) -> None:
        self._open.discard(request)

    def obey(self, command: bytes) -> int:
        """Carries out an order, in any thread. Returns the number of open requests."""
        if command in (DRAIN, CUT):
            self.is_ending = True
        if command == CUT and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cut)
        return len(self._open)

    def listen(self, door: str) -> None:
        """Starts to take orders under a name, in a thread."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(door)
        except OSError as error:  # the endpoint serves without; its streams are cut when it ends
            _log.warning("no order to end can be taken: %s", error)
            listener.close()
            return
        listener.listen()
        threading.Thread(
            target=self._listen, args=(listener,), name="doorkeeper", daemon=True
        ).start()

    def _cut(self) -> None:
        for request in list(self._open):
            request.cut()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            end, _ = listener.accept()
            with end:
                end.settimeout(1.0)
                try:
                    if is_of_this_user(end):
                        command = end.makefile("rb").readline(16).strip()
                        end.sendall(b"%d\n" % self.obey(command))
                except OSError:  # it has gone away
                    continue
