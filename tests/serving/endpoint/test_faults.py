"""Faults under load: replicas that are killed or stopped, and clients that leave."""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.endpoint_parts import Endpoints, children_with, num_running_replicas
from tests.serving.load import Ask, End, Load, greedy_asks, percentile
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

MODEL = "tiny"
NUM_REPLICAS, NUM_SLOTS, MAX_QUEUE_S = 2, 4, 20.0
NUM_CLIENTS = 16
MAX_TOKENS = 60
UNARY, STREAMED = False, True
Gauges = tuple[float, float, float]
IDLE: Gauges = (0.0, 0.0, 0.0)
ALL_WELL = {(UNARY, End.DONE), (STREAMED, End.DONE)}


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, checkpoint: Path) -> str:
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name=MODEL,
        replicas=ReplicaConfig(min_replicas=NUM_REPLICAS, max_replicas=NUM_REPLICAS),
        engine=EngineConfig(max_num_seqs=NUM_SLOTS, max_queue_s=MAX_QUEUE_S),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture(scope="module")
def asks(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[Ask]:
    return greedy_asks(model, tokenizer, prompts, max_tokens=MAX_TOKENS)


@pytest.fixture
def load(url: str, asks: list[Ask]) -> Load:
    return Load(url, MODEL, asks)


def replicas(checkpoint: Path) -> list[psutil.Process]:
    """Each is the parent of its engine process."""
    return [
        parent
        for engine in children_with(str(checkpoint))
        if (parent := engine.parent()) is not None
    ]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def all_replicas_run(checkpoint: Path) -> bool:
    """For Ray Serve, and for us: it learns of a death a moment later."""
    return num_running_replicas() == NUM_REPLICAS == len(replicas(checkpoint))


def gauges(url: str) -> dict[str, Gauges]:
    """Running, waiting and cache use of each replica: /metrics is that of the replica that answers.
    Nothing while one of them does not, as the proxy learns of a new one a moment after Ray
    Serve."""
    found: dict[str, Gauges] = {}
    for _ in range(50):
        replica, values = gauges_of_one(url)
        found[replica] = values
        if len(found) == NUM_REPLICAS:
            return found
    return {}


def gauges_of_one(url: str) -> tuple[str, Gauges]:
    """The replica that answers, and its gauges."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    text = httpx.get(f"{url}/metrics", timeout=limit_s(10)).text
    lines = [re.search(rf'^{name}{{.*replica="(.*)"}} (.*)$', text, re.MULTILINE) for name in names]
    replica = {line[1] for line in lines if line}.pop()
    running, waiting, cache_use = (float(line[2]) for line in lines if line)
    return replica, (running, waiting, cache_use)


def last_busy_s(url: str) -> float:
    """Waits until each replica has shown that it is idle, and returns the seconds after which one
    was last seen busy.

    For 10 s after a load, Ray Serve may send all requests to one of them: it remembers the other's
    queue so long.
    """
    start_s, last_s, idle = time.monotonic(), 0.0, set()
    while len(idle) < NUM_REPLICAS:
        elapsed_s = time.monotonic() - start_s
        assert elapsed_s < limit_s(15), "a replica is busy, or does not answer"
        replica, values = gauges_of_one(url)
        if values == IDLE:
            idle.add(replica)
        else:
            idle.discard(replica)
            last_s = elapsed_s
        time.sleep(0.02)
    return last_s


def both_are_busy(url: str) -> bool:
    """Not whether all slots are taken: on a busy machine no look may fall on such a moment."""
    num_running = [running for running, _, _ in gauges(url).values()]
    return len(num_running) == NUM_REPLICAS and min(num_running) > 0


@pytest.fixture(autouse=True)
def both_replicas_are_back_and_idle(url: str, checkpoint: Path) -> Iterator[None]:
    yield
    wait_until(lambda: all_replicas_run(checkpoint), timeout_s=60)
    wait_until(lambda: set(gauges(url).values()) == {IDLE}, timeout_s=10)


@pytest.mark.parametrize(
    ("fault", "gone_within_s", "num_faults"),
    [
        (signal.SIGKILL, 1.0, 1),
        pytest.param(signal.SIGSTOP, 5.0, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1.0, 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 5.0, 4, marks=pytest.mark.slow),
    ],
)
def test_a_replica_that_dies_or_hangs_under_load(
    load: Load, checkpoint: Path, fault: signal.Signals, gone_within_s: float, num_faults: int
) -> None:
    """Requests without a first byte are answered by the other replica, streams that are cut say
    so."""
    gone_after_s: list[float] = []

    async def scenario() -> None:
        over = False

        async def faults() -> None:
            nonlocal over
            for _ in range(num_faults):
                await answered(40)
                await asyncio.to_thread(wait_until, partial(both_are_busy, load.url), timeout_s=30)
                victim = replicas(checkpoint)[0]
                os.kill(victim.pid, fault)
                gone_after_s.append(
                    await asyncio.to_thread(wait_until, partial(is_gone, victim), timeout_s=20)
                )
                await asyncio.to_thread(
                    wait_until, partial(all_replicas_run, checkpoint), timeout_s=60
                )
            await answered(40)
            over = True

        async def answered(num_more: int) -> None:
            enough = len(load.outcomes) + num_more
            while len(load.outcomes) < enough:
                await asyncio.sleep(0.05)

        async with asyncio.timeout(limit_s(150)), asyncio.TaskGroup() as group:
            group.create_task(
                load.run_clients(NUM_CLIENTS, until=lambda: over, max_requests=20_000, seed=1)
            )
            group.create_task(faults())

    asyncio.run(scenario())
    counts = load.check(allowed=ALL_WELL | {(STREAMED, End.ERROR_EVENT)})
    p99_s = percentile([outcome.latency_s for outcome in load.outcomes], 0.99)
    print(f"{fault.name}: {dict(counts)}, gone after {gone_after_s} s, p99 {p99_s:.2f} s")
    assert max(gone_after_s) <= limit_s(gone_within_s)
    assert fault is signal.SIGKILL or p99_s <= limit_s(10)
    assert counts[STREAMED, End.ERROR_EVENT] <= num_faults * (NUM_CLIENTS // 2)


@pytest.mark.parametrize("num_streams", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_streams_that_clients_leave_free_everything(load: Load, url: str, num_streams: int) -> None:
    rng = random.Random(2)

    async def leave(http: httpx.AsyncClient, room: asyncio.Semaphore) -> None:
        body = {
            "model": MODEL,
            "prompt": [1],
            "max_tokens": 127,
            "ignore_eos": True,
            "stream": True,
        }
        async with room, http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            num_events = rng.randrange(40)
            async for _ in answer.aiter_lines():
                num_events -= 1
                if num_events < 0:
                    return

    async def scenario() -> None:
        room = asyncio.Semaphore(NUM_CLIENTS)
        async with (
            httpx.AsyncClient(base_url=url, timeout=limit_s(60)) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(num_streams):
                group.create_task(leave(http, room))

    asyncio.run(scenario())
    took_s = last_busy_s(url)
    print(f"all slots free {took_s:.2f} s after the last of {num_streams} clients left")
    assert took_s <= limit_s(1)
    asyncio.run(load.run_clients(NUM_CLIENTS, until=lambda: False, max_requests=40, seed=3))
    load.check(allowed=ALL_WELL)
