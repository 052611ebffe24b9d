"""Replicas that come and go with the load: from one to two and back without a failed request, and to none at all."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.serve_config import ReplicaConfig, ServeConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer
from serving.app import run
from tests.serving.endpoint_parts import free_port, metric, num_running_replicas, ray_cluster, wait_until
from tests.serving.load import End, Load, greedy_asks

MODEL = "tiny"
MANY, FEW = 8, 1  # clients
WELL = {(False, End.DONE), (True, End.DONE)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def load(checkpoint: Path, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> Iterator[Load]:
    config = ServeConfig(
        checkpoint=str(checkpoint),
        port=free_port(),
        model_name=MODEL,
        replicas=ReplicaConfig(
            min_replicas=0,
            max_replicas=2,
            target_ongoing_requests=4,
            scale_up_after_s=1,
            scale_down_after_s=5,
            scale_to_zero_after_s=8,
        ),
    )
    with ray_cluster():
        yield Load(str(run(config)["url"]), MODEL, greedy_asks(model, tokenizer, prompts, max_tokens=60))


def test_up_and_down_and_to_nothing_and_back(load: Load) -> None:
    async def under_load(num_clients: int, num_replicas: int) -> None:
        """Until there are as many replicas, and for a while after."""
        reached_s: float | None = None

        async def watch() -> None:
            nonlocal reached_s
            await asyncio.to_thread(wait_until, lambda: num_running_replicas() == num_replicas, timeout_s=90)
            reached_s = time.monotonic()

        def is_over() -> bool:
            return reached_s is not None and time.monotonic() - reached_s > 3

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            group.create_task(load.run_clients(num_clients, until=is_over, max_requests=20_000, seed=1))

    start_s = time.monotonic()
    for num_clients, num_replicas in [(MANY, 2), (FEW, 1), (MANY, 2), (FEW, 1)]:
        asyncio.run(under_load(num_clients, num_replicas))
        print(f"{num_replicas} replicas for {num_clients} clients after {time.monotonic() - start_s:.1f} s")
    counts = load.check(allowed=WELL)
    print(f"none of {counts} failed")

    idle_s = wait_until(lambda: num_running_replicas() == 0, timeout_s=60)
    load.outcomes.clear()

    async def ask_together() -> None:
        async with httpx.AsyncClient(base_url=load.url, timeout=None) as http:
            await asyncio.gather(*(load.ask(http, i, streamed=i % 2 == 1) for i in range(6)))

    asyncio.run(ask_together())
    load.check(allowed=WELL)
    held_s = max(outcome.latency_s for outcome in load.outcomes)
    with httpx.Client(base_url=load.url, timeout=30) as http:
        start_s = metric(http, "raymill:replica_start_seconds")
    print(
        f"no replica {idle_s:.1f} s after the last request; six requests were held for {held_s:.1f} s, of which {start_s:.1f} s in the replica's start"
    )
    assert 0 < start_s < held_s
