"""Bounded load on an endpoint, of which each request ends in exactly one way that is looked at."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.time_limits import limit_s

TIMEOUT_S = limit_s(60)


class End(StrEnum):
    DONE = "done"  # 200 and the whole answer; a stream with [DONE]
    ERROR_EVENT = "error event"  # a stream that says itself that it broke
    REFUSED = "refused"  # 429 or 503, with Retry-After
    FAILED = "failed"  # any other status
    CUT = "cut"  # the connection or the stream just ended
    STUCK = "stuck"  # no end within TIMEOUT_S


@dataclass(frozen=True)
class Outcome:
    end: End
    streamed: bool
    prompt: int  # which of the load's
    text: str  # of a stream that broke, as far as it came
    started_s: float
    latency_s: float
    detail: str = ""
    ttft_s: float | None = None  # of a stream


@dataclass(frozen=True)
class Ask:
    """One kind of request: greedy, so that its text is known beforehand."""

    prompt_ids: list[int]
    text: str
    max_tokens: int


def greedy_asks(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], *, max_tokens: int
) -> list[Ask]:
    greedy = SamplingParams(temperature=0.0)

    def text_of(prompt: list[int]) -> str:
        ids = generate(model, prompt, max_tokens=max_tokens, params=greedy, eos_id=None)
        return tokenizer.decode([token_id for token_id in ids if token_id != tokenizer.eot_id])

    return [Ask(prompt, text_of(prompt), max_tokens) for prompt in prompts]


@dataclass
class Load:
    """Requests against one endpoint, and what became of them."""

    url: str
    model: str
    asks: list[Ask]
    keep_alive: bool = True  # False: a connection for each request
    outcomes: list[Outcome] = field(default_factory=list)

    async def run_clients(
        self,
        num_clients: int,
        *,
        until: Callable[[], bool],
        max_requests: int,
        seed: int,
        streams: bool = True,
        pause_s: float = 0.0,
    ) -> None:
        """Closed loop: each client asks again `pause_s` after it has its answer, until `until`.
        Every second streams."""
        rng = random.Random(seed)

        async def client(http: httpx.AsyncClient, streamed: bool) -> None:
            while not until() and len(self.outcomes) < max_requests:
                await self.ask(http, rng.randrange(len(self.asks)), streamed=streamed)
                await asyncio.sleep(pause_s)

        async with self._http() as http, asyncio.TaskGroup() as group:
            for i in range(num_clients):
                group.create_task(client(http, streams and i % 2 == 1))

    async def run_arrivals(self, rate_per_s: float, *, num_requests: int) -> None:
        """Open loop: requests arrive whether or not others have been answered. Every second one
        streams."""
        async with self._http() as http, asyncio.TaskGroup() as group:
            start_s = time.monotonic()
            for i in range(num_requests):
                await asyncio.sleep(max(0.0, start_s + i / rate_per_s - time.monotonic()))
                group.create_task(self.ask(http, i // 2 % len(self.asks), streamed=i % 2 == 1))

    async def ask(self, http: httpx.AsyncClient, prompt: int, *, streamed: bool) -> None:
        start_s = time.monotonic()
        texts: list[str] = []
        parts_s: list[float] = []
        try:
            async with asyncio.timeout(TIMEOUT_S):
                end, detail = await self._end_of(
                    http, self.asks[prompt], texts, parts_s, streamed=streamed
                )
        except TimeoutError:
            end, detail = End.STUCK, ""
        except httpx.TransportError as error:
            end, detail = End.CUT, repr(error)
        ttft_s = parts_s[0] - start_s if parts_s else None
        self.outcomes.append(
            Outcome(
                end,
                streamed,
                prompt,
                "".join(texts),
                start_s,
                time.monotonic() - start_s,
                detail,
                ttft_s,
            )
        )

    async def _end_of(
        self,
        http: httpx.AsyncClient,
        ask: Ask,
        texts: list[str],
        parts_s: list[float],
        *,
        streamed: bool,
    ) -> tuple[End, str]:
        """Puts what arrives into `texts`, and when each part of a stream did into `parts_s`."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ask.prompt_ids,
            "max_tokens": ask.max_tokens,
        }
        body |= {"temperature": 0, "ignore_eos": True, "stream": streamed}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                detail = f"{answer.status_code} {(await answer.aread()).decode()}"
                refused = answer.status_code in (429, 503) and "retry-after" in answer.headers
                return (End.REFUSED if refused else End.FAILED), detail
            if not streamed:
                texts.append(json.loads(await answer.aread())["choices"][0]["text"])
                return End.DONE, ""
            ends: list[tuple[End, str]] = []
            async for line in answer.aiter_lines():
                if not line:
                    continue
                assert not ends, f"{line} after the end"
                event = {} if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
                if not event:
                    ends.append((End.DONE, ""))
                elif "error" in event:
                    ends.append((End.ERROR_EVENT, event["error"]["code"]))
                else:
                    parts_s.append(time.monotonic())
                    texts.append(event["choices"][0]["text"])
            return ends[0] if ends else (End.CUT, "the stream ended without [DONE] or an error")

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=None if self.keep_alive else 0
        )
        return httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits)

    def check(self, *, allowed: set[tuple[bool, End]]) -> Counter[tuple[bool, End]]:
        """That each request ended in one of the `allowed` (streamed, end), and that no text is
        wrong: a whole answer is that of the model, a broken one its beginning. Gives the counts."""
        for outcome in self.outcomes:
            assert (outcome.streamed, outcome.end) in allowed, outcome
            expected = self.asks[outcome.prompt].text
            if outcome.end is End.DONE:
                assert outcome.text == expected, outcome
            assert expected.startswith(outcome.text), outcome
        return Counter((outcome.streamed, outcome.end) for outcome in self.outcomes)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
