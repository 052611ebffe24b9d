"""A Ray cluster of its own for endpoint tests, and what they ask the endpoint besides completions."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve


@contextmanager
def ray_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("RAY_AUTH_MODE", "disabled")  # it listens on loopback, as long as the context lasts
        env.delenv("RAY_AUTH_TOKEN", raising=False)
        env.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
        )
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum over the lines of /metrics that have these labels."""
    lines = re.findall(rf"^{re.escape(name)}{{(.*)}} (.*)$", http.get("/metrics").text, re.MULTILINE)
    return sum(float(v) for found, v in lines if all(f'{k}="{label}"' in found for k, label in labels.items()))


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
