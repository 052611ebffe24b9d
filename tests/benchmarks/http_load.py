"""The load that `bench_serve` puts on a server over HTTP: streams of completions, each part timed as it arrives.

One client for all servers. It shares the processors with them, so it looks into an answer only once that has ended.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp

PROMPT_TOKENS = 128
NEW_TOKENS = 64
MODEL = "bench"  # the name that all servers give the model
TIMEOUT_S = 600.0  # of one request, while other work keeps the cores busy


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


def request_body(prompt: list[int]) -> bytes:
    """Returns a greedy request, answered to its full length."""
    fields = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


async def closed_loop(url: str, prompts: list[list[int]], *, num_streams: int) -> Load:
    """Lets each stream send the next prompt when its last answer has ended. Raises `BenchError`."""
    load, bodies = Load(), iter([request_body(prompt) for prompt in prompts])
    connector = aiohttp.TCPConnector(limit=num_streams)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start_s = time.perf_counter()
        try:
            await asyncio.gather(*(_stream(session, url, bodies, load) for _ in range(num_streams)))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{url}: {error!r}") from None
        load.wall_s = time.perf_counter() - start_s
    return load


async def _stream(session: aiohttp.ClientSession, url: str, bodies: Iterator[bytes], load: Load) -> None:
    headers = {"Content-Type": "application/json"}
    for body in bodies:
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
        if num_tokens != NEW_TOKENS:
            raise BenchError(f"{url} generated {num_tokens} tokens where {NEW_TOKENS} were asked for")
        arrivals_s = arrivals_s[:-2]  # the last two events are the usage and [DONE]
        gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
        load.num_tokens += num_tokens
        load.ttft_s.append(gaps_s[0])
        load.itl_s += gaps_s[1:]
