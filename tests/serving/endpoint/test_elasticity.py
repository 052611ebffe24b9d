"""Replicas that come and go with the load: one, three, and one again without a failed request, and
none at all."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.endpoint_parts import Endpoints, metric, num_running_replicas
from tests.serving.load import End, Load, greedy_asks
from tests.time_limits import limit_s
from tests.waiting import wait_until

MODEL = "tiny"
NUM_REPLICAS = 3
# clients; few fill one replica to three quarters, and are on all of them when two have to go
MANY, FEW = 16, 3
REPLICAS = ReplicaConfig(
    min_replicas=1,
    max_replicas=NUM_REPLICAS,
    target_ongoing_requests=1000,  # the number of requests alone never asks for more
    scale_up_after_s=1,
    scale_down_after_s=5,
    scale_to_zero_after_s=8,
)
BY_QUEUE = EngineConfig(max_num_seqs=4, max_queue_s=300)
# Four requests
BY_CACHE = EngineConfig(max_num_seqs=100, max_queue_s=300, kv_cache_tokens=512, prefix_cache=False)
WELL = {(False, End.DONE), (True, End.DONE)}

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.parametrize("engine", [BY_QUEUE, BY_CACHE], ids=["queue", "cache"])
def test_one_three_one_and_again(
    engine: EngineConfig,
    endpoints: Endpoints,
    long_checkpoint: Path,
    long_model: GPT,
    tokenizer: Tokenizer,
) -> None:
    config = ServeConfig(
        checkpoint=str(long_checkpoint), model_name=MODEL, engine=engine, replicas=REPLICAS
    )
    asks = greedy_asks(long_model, tokenizer, [list(range(60))], max_tokens=64)
    load = Load(str(endpoints.deployed(config)["url"]), MODEL, asks)

    async def under_load(num_clients: int, num_replicas: int) -> float:
        """Until there are as many replicas, and for a while after. Seconds to get there."""
        start_s = time.monotonic()
        reached_s: float | None = None

        async def watch() -> None:
            nonlocal reached_s
            await asyncio.to_thread(
                wait_until, lambda: num_running_replicas() == num_replicas, timeout_s=120
            )
            reached_s = time.monotonic()

        def is_over() -> bool:
            return reached_s is not None and time.monotonic() - reached_s > 3

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            group.create_task(
                load.run_clients(num_clients, until=is_over, max_requests=20_000, seed=1)
            )
        assert reached_s is not None
        return reached_s - start_s

    for num_clients, num_replicas in [(MANY, 3), (FEW, 1), (MANY, 3), (FEW, 1)]:
        took_s = asyncio.run(under_load(num_clients, num_replicas))
        print(f"{num_replicas} replicas for {num_clients} clients after {took_s:.1f} s")
    print(f"none of {load.check(allowed=WELL)} failed")


def test_to_nothing_and_back(
    endpoints: Endpoints,
    checkpoint: Path,
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
) -> None:
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name=MODEL,
        replicas=REPLICAS.model_copy(update={"min_replicas": 0}),
    )
    load = Load(
        str(endpoints.deployed(config)["url"]),
        MODEL,
        greedy_asks(model, tokenizer, prompts, max_tokens=60),
    )
    idle_s = wait_until(lambda: num_running_replicas() == 0, timeout_s=60)

    async def ask_together() -> None:
        async with httpx.AsyncClient(base_url=load.url, timeout=None) as http:
            await asyncio.gather(*(load.ask(http, i, streamed=i % 2 == 1) for i in range(6)))

    asyncio.run(ask_together())
    load.check(allowed=WELL)
    held_s = max(outcome.latency_s for outcome in load.outcomes)
    with httpx.Client(base_url=load.url, timeout=limit_s(30)) as http:
        start_s = metric(http, "raymill:replica_start_seconds")
    print(
        f"no replica {idle_s:.1f} s after the last request; six requests were held for {held_s:.1f} s, of which "
        f"{start_s:.1f} s in the replica's start"
    )
    assert 0 < start_s < held_s
