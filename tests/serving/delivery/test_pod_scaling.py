"""The manifests' endpoint under more and less load: Ray Serve asks for replicas, and Ray's own
autoscaler for their pods, which join and are drained. No request fails."""

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

MANY, FEW = (6, 0.1), (1, 4.0)
"""Clients, and seconds that each thinks between two requests: two cores also have to start the
pods, and a request may take a second then, of which a replica is to have less than half on
average."""

WELL = {(False, End.DONE), (True, End.DONE)}


def test_pods_join_and_leave_and_no_request_fails(
    tmp_path: Path, checkpoint: Path, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    replicas = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 0.5}
    delays = {"scale_up_after_s": 1, "scale_down_after_s": 8}
    with served_pods(checkpoint, tmp_path, **replicas, **delays) as served:
        load = Load(
            served.url,
            MODEL,
            greedy_asks(model, tokenizer, prompts, max_tokens=60),
            keep_alive=False,
        )

        async def under_load(num_clients: int, pause_s: float, num_pods: int) -> None:
            """Until there are as many pods, all of them ready, and for a while after."""
            is_over = asyncio.Event()

            def is_reached() -> bool:
                return len(served.pods.running) == len(served.service.ready) == num_pods

            async def watch() -> None:
                await asyncio.to_thread(served.until, is_reached, timeout_s=240)
                print(
                    f"{num_pods} pods for {num_clients} clients after {time.monotonic() - start_s:.0f} s"
                )
                await asyncio.sleep(3)
                is_over.set()

            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                group.create_task(
                    load.run_clients(
                        num_clients,
                        until=is_over.is_set,
                        max_requests=20_000,
                        seed=1,
                        pause_s=pause_s,
                    )
                )

        start_s = time.monotonic()
        for clients, num_pods in [(FEW, 1), (MANY, 3), (FEW, 1)]:
            asyncio.run(under_load(*clients, num_pods))
        print(f"none of {load.check(allowed=WELL)} failed")
