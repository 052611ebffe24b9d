"""A Ray cluster of its own for endpoint tests, and what they ask the endpoint besides completions."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import psutil
import uvicorn
from fastapi import APIRouter
from ray import serve
from starlette.types import ASGIApp

from cluster.settings.serve import ServeConfig
from serving.api.access import AccessRules, CurrentAccess
from serving.api.admission import AdmissionLimits
from serving.api.ingress import build_http_app
from serving.api.metrics import ReplicaMetrics
from serving.delivery.promotion import Delivery, version_of
from serving.delivery.versions import Versions
from serving.protocol.served_model import read_served_model
from tests.local_ray import local_ray


@contextmanager
def ray_cluster(*, num_cpus: int = 2) -> Iterator[None]:
    with local_ray(num_cpus=num_cpus):
        try:
            yield
        finally:
            serve.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum over the lines of /metrics that have these labels."""
    lines = re.findall(rf"^{re.escape(name)}{{(.*)}} (.*)$", http.get("/metrics").text, re.MULTILINE)
    return sum(float(v) for found, v in lines if all(f'{k}="{label}"' in found for k, label in labels.items()))


def children_with(word: str) -> list[psutil.Process]:
    """The live processes that this test's own Ray has started and whose command line has `word`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                found.append(process)
    return found


def num_running_replicas() -> int | None:
    """As Ray Serve sees it, which counts a stopped replica too; None while any starts or leaves."""
    states = dict(serve.status().applications["raymill"].deployments["Replica"].replica_states)
    running = states.pop("RUNNING", 0)
    return None if states else running


@asynccontextmanager
async def replica_app(
    folder: Path, *, name: str, config: ServeConfig | None = None, access: AccessRules | CurrentAccess | None = None
) -> AsyncIterator[tuple[ASGIApp, Versions]]:
    """A replica's routes and its engine process, without Ray."""
    config = config or ServeConfig()
    live = version_of(read_served_model(folder, name=name), checkpoint=str(folder))
    versions = Versions(config, Delivery(deployment="test", model_name=name, live=live))
    await versions.wait_until_live()
    engine = config.engine
    limits = AdmissionLimits(
        max_requests=config.replicas.max_ongoing_requests,
        max_sequences=engine.max_num_seqs + engine.max_waiting,
        max_queue_s=engine.max_queue_s,
    )
    metrics = ReplicaMetrics(versions=versions, model_name=name, replica="r", start_s=1.0)
    try:
        yield (
            build_http_app(
                versions=versions,
                metrics=metrics,
                limits=limits,
                access=access if isinstance(access, CurrentAccess) else CurrentAccess(access or AccessRules()),
                admin=APIRouter(),
            ),
            versions,
        )
    finally:
        await versions.close()


@asynccontextmanager
async def loopback_server(app: ASGIApp) -> AsyncIterator[str]:
    """The routes on a loopback port, in this event loop. Gives the URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
