"""Stands in for a Kubernetes Service: each new connection goes to a ready pod, the next one to the
next pod.

A pod is ready while its probe answers 200 and it is not told to end. Connections that are open stay
where they are, as with kube-proxy. Only bytes are passed on.
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx

from tests.time_limits import limit_s

_PROBE_S = 1.0


@dataclass
class ServiceStandIn:
    addresses: Callable[[], list[str]]
    """The addresses of the pods that are not ending."""
    target_port: int
    probe_path: str
    port: int = 0
    ready: list[str] = field(default_factory=list)
    """Returns the addresses of the pods that are ready now."""

    @contextmanager
    def serving(self) -> Iterator["ServiceStandIn"]:
        started, loop = threading.Event(), asyncio.new_event_loop()
        thread = threading.Thread(
            target=loop.run_until_complete, args=(self._serve(started),), daemon=True
        )
        thread.start()
        assert started.wait(limit_s(10))
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(self._ended.set)
            thread.join()
            loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._ended, self._turn = asyncio.Event(), itertools.count()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        probing = asyncio.create_task(self._probe())
        started.set()
        await self._ended.wait()
        probing.cancel()
        server.close()

    async def _probe(self) -> None:
        async with httpx.AsyncClient(timeout=_PROBE_S) as http:
            while True:
                addresses = self.addresses()
                answers = await asyncio.gather(
                    *(self._is_ready(http, address) for address in addresses)
                )
                self.ready = [
                    address
                    for address, is_ready in zip(addresses, answers, strict=True)
                    if is_ready
                ]
                await asyncio.sleep(_PROBE_S)

    async def _is_ready(self, http: httpx.AsyncClient, address: str) -> bool:
        try:
            return (
                await http.get(f"http://{address}:{self.target_port}{self.probe_path}")
            ).is_success
        except httpx.TransportError:
            return False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        present = set(self.addresses())
        ready = [address for address in self.ready if address in present]
        if not ready:
            writer.close()
            return
        address = ready[next(self._turn) % len(ready)]
        try:
            there, back = await asyncio.open_connection(address, self.target_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
