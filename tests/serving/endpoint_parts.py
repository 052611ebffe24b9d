"""Endpoints on a Ray of the tests, a replica without Ray, and what tests ask either besides
completions."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import uvicorn
from fastapi import FastAPI
from ray import serve
from starlette.types import ASGIApp

from cluster.local.local_cluster import free_port
from cluster.settings.serve import ServeConfig
from cluster.wings import added
from serving.api.access import AccessRules, CurrentAccess
from serving.api.admin_routes import add_admin_routes
from serving.api.ingress import all_routes, build_http_app
from serving.api.metrics import ReplicaMetrics
from serving.app import APP_NAME, run
from serving.delivery.follower import Follower
from serving.delivery.promotion import Delivery, version_of
from serving.delivery.versions import Versions
from serving.limits.key_usage import KeyUsage
from serving.protocol.served_model import read_served_model
from serving.responses.routes import add_response_routes
from tests.local_ray import local_ray
from tests.time_limits import limit_s


@contextmanager
def ray_cluster(
    *, num_cpus: int = 2, environment: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Gives the folder of Ray's logs."""
    with local_ray(num_cpus=num_cpus, environment=environment) as logs:
        try:
            yield logs
        finally:
            serve.shutdown()


class Endpoints:
    """The endpoints of several test files on one Ray, one after the other. A file takes over the
    proxy that the file before has left, and the whole endpoint where both want the same."""

    def __init__(self, ray_logs: Path) -> None:
        self.ray_logs = ray_logs
        self._config: ServeConfig | None = None
        self._result: dict[str, Any] = {}

    def deployed(self, config: ServeConfig) -> dict[str, Any]:
        """Returns what `run` gave for this endpoint, whose port is chosen here."""
        if self._config is None or self._config.http != config.http:
            serve.shutdown()  # a proxy keeps its bounds and its port
            return self._run(config, port=free_port())
        if self._config == config.model_copy(update={"port": self._config.port}):
            return self._result
        serve.delete(APP_NAME)
        return self._run(config, port=self._config.port)

    def replaced(self, config: ServeConfig) -> dict[str, Any]:
        """Deploys over the endpoint that is there, as `raymill serve` does."""
        assert self._config is not None
        return self._run(config, port=self._config.port)

    def _run(self, config: ServeConfig, *, port: int) -> dict[str, Any]:
        self._config = None  # what has failed is not taken over
        config = config.model_copy(update={"port": port})
        self._result = run(config)
        self._config = config
        return self._result


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum over the lines of /metrics that have these labels."""
    return metric_sum(http.get("/metrics").text, name, **labels)


def metric_sum(text: str, name: str, **labels: str) -> float:
    """The same of the text of /metrics."""
    lines = re.findall(rf"^{re.escape(name)}{{(.*)}} (.*)$", text, re.MULTILINE)
    return sum(
        float(v)
        for found, v in lines
        if all(f'{k}="{label}"' in found for k, label in labels.items())
    )


def assert_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Returns the error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers.get_list("x-request-id")) == 1
    error: dict[str, Any] = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable() and len(error["message"]) < 500
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert error["type"] == kind
    return error


def children_with(word: str) -> list[psutil.Process]:
    """The live processes that this test's own Ray has started and whose command line has `word`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                found.append(process)
    return found


def engine_and_replica(checkpoint: Path) -> set[int]:
    """The process ids of the one engine that serves `checkpoint`, and of its replica."""
    [engine] = [
        process
        for process in children_with("serving.engine_process.run_engine")
        if json.dumps(str(checkpoint)) in process.cmdline()[-1]  # which has the engine's settings
    ]
    return {engine.pid, engine.ppid()}


def num_running_replicas() -> int | None:
    """As Ray Serve sees it, which counts a stopped replica too; None while any starts or leaves."""
    states = dict(serve.status().applications["raymill"].deployments["Replica"].replica_states)
    running = states.pop("RUNNING", 0)
    return None if states else running


def delivery_of(folder: Path, *, name: str) -> Delivery:
    """The state of what begins with a checkpoint."""
    live = version_of(read_served_model(folder, name=name), checkpoint=str(folder))
    return Delivery(deployment="test", origin=name, model_name=name, live=live)


def routes_of(
    versions: Versions,
    *,
    access: AccessRules | CurrentAccess | None = None,
    usage: KeyUsage | None = None,
    replica: str = "r",
) -> ASGIApp:
    """A replica's routes, open to all without `access`."""
    return build_http_app(
        versions=versions,
        metrics=ReplicaMetrics(versions=versions, replica=replica, start_s=1.0),
        access=access
        if isinstance(access, CurrentAccess)
        else CurrentAccess(access or AccessRules()),
        usage=KeyUsage() if usage is None else usage,
        others=(add_response_routes, *added(lambda wing: wing.routes)),
    )


def all_routes_of(config: ServeConfig) -> FastAPI:
    """An application with a replica's routes, of which none is asked."""
    follower = Follower(config, Any, deployment="d", replica="r", on_live_death=print)
    parts = cast(Any, SimpleNamespace(config=config))
    others = (add_response_routes, *added(lambda wing: wing.routes))
    app, _ = all_routes(parts, parts, parts, others=others)
    add_admin_routes(app, follower)
    return app


@asynccontextmanager
async def replica_app(
    folder: Path,
    *,
    name: str,
    config: ServeConfig | None = None,
    access: AccessRules | CurrentAccess | None = None,
) -> AsyncIterator[tuple[ASGIApp, Versions]]:
    """A replica's routes and its engine process, without Ray."""
    config = config or ServeConfig()
    adapters = {
        adapter: delivery_of(Path(place), name=adapter)
        for adapter, place in config.adapters.items()
    }
    state = delivery_of(folder, name=name).having(adapters=adapters)
    versions = Versions(config, state, on_live_death=print)
    await versions.wait_until_live()
    try:
        yield routes_of(versions, access=access), versions
    finally:
        await versions.close()


@asynccontextmanager
async def replica_client(
    folder: Path,
    *,
    config: ServeConfig | None = None,
    access: AccessRules | None = None,
    key: str | None = None,
) -> AsyncIterator[tuple[httpx.AsyncClient, Versions]]:
    """A client of `replica_app`, which serves the model under the name "tiny"."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with (
        replica_app(folder, name="tiny", config=config, access=access) as (app, versions),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://test",
            timeout=limit_s(60),
            headers=headers,
        ) as http,
    ):
        yield http, versions


Check = Callable[[httpx.AsyncClient, Versions], Coroutine[Any, Any, None]]
Run = Callable[[Check], None]


@contextmanager
def shared_replica(folder: Path, **settings: Any) -> Iterator[Run]:
    """Gives a function that runs a test's body beside one `replica_client` that all of them
    share."""
    with asyncio.Runner() as runner:
        context = replica_client(folder, **settings)
        http, versions = runner.run(context.__aenter__())
        yield lambda check: runner.run(check(http, versions))
        runner.run(context.__aexit__(None, None, None))


@asynccontextmanager
async def loopback_server(app: ASGIApp) -> AsyncIterator[str]:
    """The routes on a loopback port, in this event loop. Gives the URL."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_level="warning")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
