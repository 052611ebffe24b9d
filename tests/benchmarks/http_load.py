"""The load that benchmarks put on a server over HTTP: streams of completions, each part timed as it
arrives.

One client for all servers. It shares the processors with them, so it looks into an answer only once
that has ended.
"""

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp

PROMPT_TOKENS = 128
NEW_TOKENS = 64
# Of mixed requests, whose streams do not run in step
MIXED_PROMPT_TOKENS = (32, 512)
MIXED_NEW_TOKENS = (16, 128)
MODEL = "bench"  # the name that all servers give the model
TIMEOUT_S = 600.0  # of one request, while other work keeps the cores busy
# One process receives about 15,000 tokens a second, less than a GPU generates
STREAMS_OF_A_CLIENT = 32


class BenchError(Exception):
    """A contender is missing, fails, or answers something else than it was asked."""


@dataclass
class Load:
    """A contender's results in one round of requests."""

    num_tokens: int = 0
    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def mixed_new_tokens(prompt: list[int]) -> int:
    """Returns how many tokens a mixed request asks for. It is drawn by the prompt, so that every
    contender is asked for the same."""
    return random.Random(prompt[0]).randint(*MIXED_NEW_TOKENS)


def request_body(prompt: list[int], *, new_tokens: int) -> bytes:
    """Returns a greedy request, answered to its full length."""
    fields = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


def loaded(url: str, prompts: list[list[int]], *, num_streams: int, is_mixed: bool = False) -> Load:
    """Lets several processes be the client where there are cores for them. Raises `BenchError`."""
    num_clients = max(1, min(num_streams // STREAMS_OF_A_CLIENT, (os.cpu_count() or 1) // 4))
    if num_clients == 1:
        return asyncio.run(closed_loop(url, prompts, num_streams=num_streams, is_mixed=is_mixed))
    context = multiprocessing.get_context("fork")  # another one would import PyTorch for each
    together, results = context.Barrier(num_clients), context.Queue()

    def work(number: int) -> None:
        together.wait(TIMEOUT_S)
        share = closed_loop(
            url,
            prompts[number::num_clients],
            num_streams=num_streams // num_clients,
            is_mixed=is_mixed,
        )
        try:
            results.put(asyncio.run(share))
        except BenchError as error:
            results.put(error)

    clients = [
        context.Process(target=work, args=(number,), daemon=True) for number in range(num_clients)
    ]
    for client in clients:
        client.start()
    loads: list[Load] = []
    for _ in clients:
        result = results.get(timeout=TIMEOUT_S)
        if isinstance(result, BenchError):
            raise result
        loads.append(result)
    return Load(
        num_tokens=sum(load.num_tokens for load in loads),
        wall_s=max(load.wall_s for load in loads),
        ttft_s=[seconds for load in loads for seconds in load.ttft_s],
        itl_s=[seconds for load in loads for seconds in load.itl_s],
    )


async def closed_loop(
    url: str,
    prompts: list[list[int]],
    *,
    num_streams: int,
    new_tokens: int = NEW_TOKENS,
    is_mixed: bool = False,
) -> Load:
    """Lets each stream send the next prompt when its last answer has ended. Raises `BenchError`."""
    load = Load()
    requests: list[tuple[int, bytes]] = []  # tokens that are asked for, body
    for prompt in prompts:
        count = mixed_new_tokens(prompt) if is_mixed else new_tokens
        requests.append((count, request_body(prompt, new_tokens=count)))
    next_up = iter(requests)
    connector = aiohttp.TCPConnector(limit=num_streams)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start_s = time.perf_counter()
        try:
            await asyncio.gather(
                *(_stream(session, url, next_up, load) for _ in range(num_streams))
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{url}: {error!r}") from None
        load.wall_s = time.perf_counter() - start_s
    return load


async def _stream(
    session: aiohttp.ClientSession, url: str, next_up: Iterator[tuple[int, bytes]], load: Load
) -> None:
    headers = {"Content-Type": "application/json"}
    for new_tokens, body in next_up:
        received, arrivals_s = b"", [time.perf_counter()]
        async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
            async for chunk in response.content.iter_any():
                now_s = time.perf_counter()
                # The end of an event may come in two pieces.
                num_events = chunk.count(b"\n\n") + (chunk[:1] == b"\n" and received[-1:] == b"\n")
                arrivals_s += [now_s] * num_events
                received += chunk
        events = received.split(b"\n\n")
        if response.status != 200 or len(events) < 4 or events[-2] != b"data: [DONE]":
            raise BenchError(f"{url} answered {response.status}: {received[-500:]!r}")
        num_tokens = json.loads(events[-3].removeprefix(b"data: "))["usage"]["completion_tokens"]
        if num_tokens != new_tokens:
            raise BenchError(
                f"{url} generated {num_tokens} tokens where {new_tokens} were asked for"
            )
        arrivals_s = arrivals_s[:-2]  # the last two events are the usage and [DONE]
        gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
        load.num_tokens += num_tokens
        load.ttft_s.append(gaps_s[0])
        load.itl_s += gaps_s[1:]
