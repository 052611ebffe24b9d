"""The head of the manifests' endpoint is lost under load: its state is in Redis, and no request
fails."""

import asyncio
import time
from pathlib import Path

import pytest

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.k8s.pod_process import needs_pods
from tests.k8s.served_pods import MODEL, served_pods
from tests.redis_server import needs_redis
from tests.serving.load import End, Load, greedy_asks

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_pods, needs_redis]

WELL = {(False, End.DONE), (True, End.DONE)}


def test_no_request_fails_while_the_head_is_lost(
    tmp_path: Path, checkpoint: Path, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    with served_pods(checkpoint, tmp_path, min_replicas=2, max_replicas=2) as served:
        asks = greedy_asks(model, tokenizer, prompts, max_tokens=60)
        load = Load(served.url, MODEL, asks, keep_alive=False)
        before = served.pods.running

        async def under_load() -> None:
            is_over = asyncio.Event()

            async def lose_the_head() -> None:
                await asyncio.sleep(5)
                served.pods.kill_head()
                lost_s = time.monotonic()
                await asyncio.to_thread(served.until, served.pods.is_up)
                print(f"the head answers {time.monotonic() - lost_s:.1f} s after its loss")
                await asyncio.to_thread(served.until, lambda: served.status() == "RUNNING")
                print(f"Ray Serve's controller answers {time.monotonic() - lost_s:.1f} s after it")
                await asyncio.sleep(10)
                is_over.set()

            async with asyncio.TaskGroup() as group:
                group.create_task(lose_the_head())
                group.create_task(
                    load.run_clients(
                        4, until=is_over.is_set, max_requests=20_000, seed=1, pause_s=0.1
                    )
                )

        asyncio.run(under_load())
        counts = load.check(allowed=WELL)
        print(f"none of {counts} failed")
        assert len(load.outcomes) > 100
        assert served.pods.running == before
