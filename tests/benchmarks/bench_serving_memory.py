"""The memory of an endpoint's processes: a proxy that many clients leave waiting for their bodies,
and an engine that answers one request after another.

    python -m tests.benchmarks.bench_serving_memory [PICTURE]

Prints a JSON object for the proxy, for the engine, and for one without a prefix cache, and draws
them. It takes three minutes on two quiet cores.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

from jobs.report.page import ACCENT, SERIES, new_figure, png, style
from tests.benchmarks.bench_delivery import Clients, write_checkpoints
from tests.benchmarks.engine_memory import CACHE_MB, WITH_PREFIXES, WITHOUT_PREFIXES, EngineMemory
from tests.repository import REPOSITORY
from tests.serving.endpoint_parts import children_with
from tests.serving.load import End
from tests.serving.serve_command import PROXY, serve_command
from tests.time_limits import limit_s

NUM_BODIES = 1000
PART_BYTES = 256 << 10  # of each body, which says that it is a megabyte
WAVE_S, NUM_WAVES = 16.0, 2  # a proxy waits 15 s for a body
BEFORE_S, AFTER_S = 8.0, 10.0
SAMPLE_S, PROBE_S = 0.25, 0.2


@dataclass
class ProxyMemory:
    """A proxy's resident memory, and what its other clients saw meanwhile."""

    seconds: list[float] = field(default_factory=list)  # since the bodies began
    resident_mb: list[float] = field(default_factory=list)
    # Of each answered /health while the bodies were open
    probes_s: list[float] = field(default_factory=list)
    num_unanswered_probes: int = 0
    num_answers: int = 0  # of other clients
    num_failed: int = 0

    @property
    def growth_mb(self) -> float:
        before = [
            size for second, size in zip(self.seconds, self.resident_mb, strict=True) if second < 0
        ]
        return max(self.resident_mb) - max(before)


def memory_of_proxy() -> ProxyMemory:
    """Serves with one proxy, whose memory is looked at before, under and after the unfinished
    bodies."""
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4 * NUM_BODIES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        folder = Path(scratch)
        write_checkpoints(folder)
        with serve_command(folder / "first", folder, "--cluster.num-nodes", "1") as served:
            [proxy] = children_with(PROXY)
            return asyncio.run(_looked_at(proxy, served.url))


async def _looked_at(proxy: psutil.Process, url: str) -> ProxyMemory:
    memory, over, under_attack = ProxyMemory(), asyncio.Event(), asyncio.Event()
    clients = Clients(url)
    began_s = time.monotonic() + BEFORE_S

    async def look() -> None:
        while not over.is_set():
            memory.seconds.append(round(time.monotonic() - began_s, 2))
            memory.resident_mb.append(round(proxy.memory_info().rss / 1e6, 1))
            await asyncio.sleep(SAMPLE_S)

    async def probe() -> None:
        await under_attack.wait()
        while under_attack.is_set():
            start_s = time.monotonic()
            try:
                # A connection for each, as Kubernetes has
                async with httpx.AsyncClient(timeout=limit_s(10)) as http:
                    (await http.get(f"{url}/health")).raise_for_status()
                memory.probes_s.append(round(time.monotonic() - start_s, 3))
            except httpx.HTTPError:
                memory.num_unanswered_probes += 1
            await asyncio.sleep(PROBE_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(look())
        group.create_task(probe())
        group.create_task(clients.keep_asking(over))
        await asyncio.sleep(BEFORE_S)
        under_attack.set()
        for _ in range(NUM_WAVES):
            await asyncio.gather(*(_unfinished_body(url) for _ in range(NUM_BODIES)))
        under_attack.clear()
        await asyncio.sleep(AFTER_S)
        over.set()
    memory.num_answers, memory.num_failed = clients.ends[End.DONE], clients.num_failed
    return memory


async def _unfinished_body(url: str) -> None:
    """Sends headers and a part of a body, and leaves after a wave, or when the proxy has ended the
    connection and the wave is over."""
    address = httpx.URL(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {1 << 20}\r\n"
    until_s = time.monotonic() + WAVE_S
    with suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + WAVE_S):
                writer.write(f"{head}\r\n".encode() + b"a" * PART_BYTES)
                await reader.read()
        finally:
            writer.close()
    await asyncio.sleep(max(0.0, until_s - time.monotonic()))


def memory_of_engine(variant: str) -> EngineMemory:
    """Measures in a process of its own, which nothing else has used."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.engine_memory", variant],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=limit_s(300),
        check=True,
    )
    return EngineMemory(**json.loads(done.stdout))


def picture_of_serving_memory() -> bytes:
    """Returns the curves of proxy and engine as PNG."""
    proxy = memory_of_proxy()
    engine, engine_without_prefixes = (
        memory_of_engine(WITH_PREFIXES),
        memory_of_engine(WITHOUT_PREFIXES),
    )
    print(
        *(json.dumps(asdict(part)) for part in (proxy, engine, engine_without_prefixes)),
        sep="\n",
        flush=True,
    )
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        style(axes)
        axes.set_ylabel("resident memory, MB")
    left.set_title("A proxy under unfinished bodies", loc="left", fontweight="bold")
    left.set_xlabel("seconds")
    left.axvspan(
        0, NUM_WAVES * WAVE_S, color=ACCENT, alpha=0.12, label=f"{NUM_BODIES:,} unfinished bodies"
    )
    left.plot(proxy.seconds, proxy.resident_mb, color=SERIES, label="proxy")
    right.set_title("An engine, one request at a time", loc="left", fontweight="bold")
    right.set_xlabel("requests of 63 tokens, no two with the same start")
    right.plot(engine.num_requests, engine.resident_mb, color=SERIES, label="engine")
    without = engine_without_prefixes
    right.plot(
        without.num_requests,
        without.resident_mb,
        "--",
        color=SERIES,
        label="engine without prefix_cache",
    )
    limit_mb = engine.resident_mb[0] + CACHE_MB
    right.axhline(limit_mb, color=ACCENT, linestyle=":", label="its start and the whole KV cache")
    for axes in (left, right):
        axes.set_ylim(0)
    return png(figure, columns=5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="the picture, if it is to be kept")
    arguments = parser.parse_args()
    picture = picture_of_serving_memory()
    if arguments.file is not None:
        arguments.file.write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
