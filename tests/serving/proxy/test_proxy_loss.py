"""The loss of a proxy of `raymill serve`: its connections end, and the other one answers everything
that comes later."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.endpoint_parts import children_with
from tests.serving.load import End, Load, Outcome, greedy_asks
from tests.serving.serve_command import MODEL, PROXY, killed, serve_command
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_CLIENTS = 6
ANSWERS_BETWEEN = 60
WELL = {(False, End.DONE), (True, End.DONE)}


@dataclass(frozen=True)
class Loss:
    """The end of a process."""

    began_s: float
    ended_s: float

    def met(self, outcome: Outcome) -> bool:
        """Tells whether the request was open at the time."""
        return (
            outcome.started_s <= self.ended_s
            and outcome.started_s + outcome.latency_s >= self.began_s
        )


def num_listening(port: int) -> int:
    """Returns how many processes take connections at the port, which the kernel spreads over
    them."""
    sockets = psutil.net_connections("tcp4")
    return sum(end.status == psutil.CONN_LISTEN and end.laddr.port == port for end in sockets)


def test_requests_that_come_after_the_loss_of_a_proxy_are_answered(
    tmp_path: Path, checkpoint: Path, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Each of the two is lost once, and is back before the other is lost."""
    with serve_command(checkpoint, tmp_path) as served:
        port = httpx.URL(served.url).port or 0
        wait_until(
            lambda: num_listening(port) == 2, why=lambda: f"{num_listening(port)} proxies, not 2"
        )
        load = Load(
            served.url,
            MODEL,
            greedy_asks(model, tokenizer, prompts, max_tokens=40),
            keep_alive=False,
        )
        losses: list[Loss] = []

        async def answered(num_more: int) -> None:
            enough = len(load.outcomes) + num_more
            while len(load.outcomes) < enough:
                await asyncio.sleep(0.05)

        async def lose_both(is_over: asyncio.Event) -> None:
            for proxy in children_with(PROXY):
                await answered(ANSWERS_BETWEEN)
                began_s = time.monotonic()
                await asyncio.to_thread(killed, proxy)
                losses.append(Loss(began_s, time.monotonic()))
                back_s = await asyncio.to_thread(wait_until, lambda: num_listening(port) == 2)
                print(f"another proxy takes connections {back_s:.1f} s after the loss")
            await answered(ANSWERS_BETWEEN)
            is_over.set()

        async def under_load() -> None:
            is_over = asyncio.Event()
            async with asyncio.timeout(limit_s(120)), asyncio.TaskGroup() as group:
                group.create_task(
                    load.run_clients(NUM_CLIENTS, until=is_over.is_set, max_requests=20_000, seed=1)
                )
                group.create_task(lose_both(is_over))

        asyncio.run(under_load())
        exit_code = served.ended()
    cut = [outcome for outcome in load.outcomes if any(loss.met(outcome) for loss in losses)]
    print(f"{len(load.outcomes)} requests, of which {len(cut)} were open during a loss")
    load.outcomes = [outcome for outcome in load.outcomes if outcome not in cut]
    load.check(allowed=WELL)
    assert exit_code == 0
