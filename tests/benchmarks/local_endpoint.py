"""An endpoint in one process: a replica's routes behind the front door, without Ray.

    python tests/benchmarks/local_endpoint.py CHECKPOINT

`bench_cpu_per_token` runs this file also with the code of other checkouts, which PYTHONPATH names.
A line of JSON says that it is ready; it lives until its standard input ends.
"""

import asyncio
import json
import sys
from pathlib import Path

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

import serving
from cluster.local.local_cluster import free_port
from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.front_door import FrontDoor
from serving.proxy.http_bounds import install_bounds
from serving.proxy.request_log import no_log
from tests.serving.endpoint_parts import replica_app

MODEL = "bench"


async def serve(checkpoint: Path) -> None:
    bounds = HttpConfig()
    install_bounds(bounds, no_log)
    async with replica_app(checkpoint, name=MODEL) as (app, _):
        door = FrontDoor(app, config=bounds, count=lambda *_: None, log=no_log, tracer=NO_TRACER)
        port = free_port()
        server = uvicorn.Server(
            uvicorn.Config(
                door,
                host="127.0.0.1",
                port=port,
                lifespan="off",
                log_level="warning",
                access_log=False,
            )
        )
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready = {"url": f"http://127.0.0.1:{port}", "code": str(serving.__path__[0])}
        print(json.dumps(ready), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await running


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(serve(Path(sys.argv[1])))
