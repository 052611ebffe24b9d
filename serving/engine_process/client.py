"""The replica's side of the engine process: starts it, sends it sequences, gives its reports to the
requests."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from cluster.settings.serve import EngineConfig
from model.errors import UserError
from model.generation.sampling_params import SamplingParams
from serving.engine.messages import (
    Admission,
    EngineFacts,
    FinishReason,
    MetricFamily,
    SequenceRequest,
    StepReport,
    TokenEvent,
    encode_message,
    parse_report,
)
from serving.engine_process.child_process import Child, start_child
from serving.engine_process.fair_queue import FairQueue
from serving.engine_process.peer_watchdog import watch_peer
from serving.engine_process.sequence_queue import SequenceQueue

MODULE = "serving.engine_process.run_engine"
SHUTDOWN_TIMEOUT_S = 5.0
# Of the places: sequences that wait in the engine, so that a free place is taken in the next step
SPARE_SHARE = 0.25
VLLM_PYTHON_VARIABLE = "RAYMILL_VLLM_PYTHON"  # which the image sets


class EngineDiedError(Exception):
    """The engine process has ended and gives no more answers."""


def submission(request: SequenceRequest) -> bytes:
    """Returns the message that gives the engine a sequence. orjson writes a dataclass as it is:
    `asdict` would copy each token of the prompt, and take 90 µs for 128 of them."""
    return orjson.dumps({"submit": request}, option=orjson.OPT_APPEND_NEWLINE)


class StepObserver(Protocol):
    """Hears how long sequences have waited, and of each step that works on them."""

    def admitted(self, waited_s: float) -> None: ...

    def stepped(self, report: StepReport) -> None: ...


class Generation:
    """The events of one request's sequences, in order, until each sequence has finished."""

    def __init__(
        self,
        client: "EngineClient",
        requests: Sequence[SequenceRequest],
        *,
        key: str,
        observer: StepObserver | None,
    ) -> None:
        self.observer = observer
        self._client = client
        self._open = {request.seq_id for request in requests}
        self.key = key  # name of the API key, or empty
        self.unsent = deque(requests)  # these are not in line yet
        self._events: deque[TokenEvent | None] = deque()
        self._has_events = asyncio.Event()
        self.entered_s: dict[int, float] = {}  # when each sequence got in line
        # By sequence that has begun, tokens of its prompt that the cache had
        self.num_found: dict[int, int] = {}
        # The engine has admitted one of its sequences, or has died
        self.has_begun = asyncio.Event()

    def close(self) -> None:
        """Ends the sequences that still run. Their slots are free from the next step on."""
        self.unsent.clear()
        for seq_id in list(self._open):
            self.cancel(seq_id)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yields the events. Raises `EngineDiedError` when the engine dies."""
        while self._open:
            if not self._events:
                self._has_events.clear()
                await self._has_events.wait()
            event = self._events.popleft()
            if event is None:
                raise EngineDiedError(self._client.death_notice)
            if event.seq_id in self._open:  # not cancelled since this was sent
                if event.finish_reason is not None:
                    self._open.remove(event.seq_id)
                yield event

    def cancel(self, seq_id: int) -> None:
        self._open.discard(seq_id)
        self._client.cancel(seq_id)

    def put(self, event: TokenEvent | None) -> None:
        self.has_begun.set()
        self._events.append(event)
        self._has_events.set()


class EngineClient:
    """One engine process. All methods run in the event loop of `start`.

    The engine takes sequences in the order in which they arrive there, so only those that it can
    soon start are sent. The others are held back here, in an order that is fair between API keys.
    """

    facts: EngineFacts
    queue: SequenceQueue

    def __init__(
        self, child: Child, *, python: str = sys.executable, max_adapters: int = 0
    ) -> None:
        self.python = python  # which runs it
        self.max_adapters = max_adapters
        self._process, self._reader, self._writer = child
        self._seq_ids = itertools.count()
        self._weights = itertools.count(1)
        self.num_users = 1  # versions that it computes
        self._generations: dict[int, Generation] = {}  # by open sequence
        self._held = FairQueue()
        self._reports: asyncio.Task[None] | None = None
        self.num_running = 0
        self._num_waiting_there = 0
        self.kv_cache_usage = 0.0  # share of the blocks that are held
        self.num_failed_sequences = 0  # ended by logits that are not finite numbers
        self._metrics: list[MetricFamily] = []
        self.last_progress_s = time.monotonic()  # of a report, or of new work for an idle engine
        self.death_notice = ""
        self._observer: StepObserver | None = None  # of the sequences in the latest step
        # Called with the notice before any request hears of it
        self.on_death: Callable[[str], None] | None = None

    @classmethod
    async def start(
        cls, checkpoint: Path, *, config: EngineConfig, eos_id: int | None, threads: int
    ) -> "EngineClient":
        """Starts the process, and returns once the weights are loaded. Raises `UserError` for an
        unusable checkpoint."""
        python = sys.executable
        if config.runs_vllm:
            python = config.vllm_python or os.environ.get(VLLM_PYTHON_VARIABLE) or python
        line, their_line = socket.socketpair()
        fds = [their_line.fileno()]
        arguments = {
            "checkpoint": str(checkpoint.absolute()),
            "threads": threads,
            "eos_id": eos_id,  # None without a tokenizer
            "watchdog": fds[0],
        }
        with their_line:
            child = await start_child(
                MODULE,
                arguments,
                private={"config": config.model_dump()},  # `vllm_args` may hold tokens
                pass_fds=fds,
                python=python,
            )
        client = cls(child, python=python, max_adapters=config.max_adapters or 0)
        messages = client._messages()
        first = await anext(messages, None)
        if first is None or "error" in first:
            line.close()
            await client.close()
            raise (
                EngineDiedError(await client._describe_death())
                if first is None
                else UserError(first["error"])
            )
        watch_peer(line, peer_pid=client.pid)
        client.facts = facts = EngineFacts(*first["ready"])
        client.queue = SequenceQueue(
            num_slots=facts.max_num_seqs, tokens_per_step=facts.tokens_per_step
        )
        client._reports = asyncio.create_task(client._dispatch(messages))
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self.death_notice

    @property
    def num_open_sequences(self) -> int:
        """The number of sequences that run or wait."""
        return len(self._generations)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting_there + len(self._held)

    def ahead(self, key: str) -> tuple[int, int, float]:
        """Returns how many requests and how many sequences, running or waiting, a new sequence of
        `key` would have before it, and its expected wait in seconds; it passes others of a key that
        has asked for more."""
        passed = {request.seq_id for request in self._held.behind(key)}
        requests = {
            generation for seq_id, generation in self._generations.items() if seq_id not in passed
        }
        return len(requests), len(self._generations) - len(passed), self.queue.wait_s(passed)

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    def own_sequence(
        self, prompt_ids: list[int], *, max_tokens: int, weights: int
    ) -> SequenceRequest:
        """Returns a greedy sequence of the replica's own. All have their prompt's
        log-probabilities: vLLM compiles for those once, in seconds, at its start and not while
        clients wait."""
        seq_id, greedy = self.next_seq_id(), SamplingParams(temperature=0.0)
        return SequenceRequest(
            seq_id, prompt_ids, max_tokens, greedy, num_prompt_logprobs=0, weights=weights
        )

    def share(self, checkpoint: Path) -> int:
        """Returns the number of another checkpoint of the same shape, for sequences to name. Each
        user closes."""
        self.num_users += 1
        weights = next(self._weights)
        self._writer.write(
            encode_message({"weights": weights, "checkpoint": str(checkpoint.absolute())})
        )
        return weights

    def submit(
        self,
        requests: Sequence[SequenceRequest],
        *,
        at_once: int | None = None,
        key: str = "",
        observer: StepObserver | None = None,
    ) -> Generation:
        """Puts a request's sequences in line for the engine: `at_once` now, or all, and another one
        whenever one of them has ended. Raises `EngineDiedError` if the engine has died."""
        if not self.alive:
            raise EngineDiedError(self.death_notice)
        if not self._generations:
            self.last_progress_s = time.monotonic()
        generation = Generation(self, requests, key=key, observer=observer)
        for _ in requests[:at_once]:
            self._enter_next(generation)
        self._send_next()
        return generation

    def _enter_next(self, generation: Generation) -> None:
        if generation.unsent and self.alive:
            request = generation.unsent.popleft()
            self._generations[request.seq_id] = generation
            generation.entered_s[request.seq_id] = time.monotonic()
            self.queue.enter(request.seq_id, num_prompt_tokens=len(request.prompt_ids))
            self._held.put(request, key=generation.key)

    def cancel(self, seq_id: int) -> None:
        generation = self._generations.pop(seq_id, None)
        if generation is None:
            return
        self.queue.leave(seq_id)
        if not self._held.remove(seq_id) and self.alive:
            self._writer.write(encode_message({"cancel": seq_id}))
        self._enter_next(generation)
        self._send_next()

    def metrics(self) -> list[MetricFamily]:
        """Returns the engine's own metrics as the call before asked for them, and asks for new
        ones. The engine gives them between two steps, so a scrape never waits for a step."""
        if self.alive:
            self._writer.write(encode_message({"metrics": None}))
        return self._metrics

    def kill(self) -> None:
        """Kills an engine that makes no progress."""
        self._process.kill()

    async def close(self) -> None:
        """Ends the process after its last user, by closing its socket; kills it if that does not
        help."""
        self.num_users -= 1
        if self.num_users > 0:
            return
        self.on_death = None
        self._writer.close()
        try:
            await asyncio.to_thread(self._process.wait, SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _send_next(self) -> None:
        """Sends what the engine can soon start."""
        places = self.queue.num_places
        while self._held and len(self._generations) - len(self._held) < places + math.ceil(
            SPARE_SHARE * places
        ):
            self._writer.write(submission(self._held.take()))

    async def _messages(self) -> AsyncIterator[Any]:
        """Yields what the engine process sends until it ends."""
        with contextlib.suppress(ConnectionError):  # it was killed before it read our commands
            async for line in self._reader:
                if line.endswith(b"\n"):  # not cut off by its death
                    yield json.loads(line)

    async def _dispatch(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            self.last_progress_s = time.monotonic()
            if isinstance(message, dict) and "metrics" in message:
                self._metrics = [MetricFamily(*family) for family in message["metrics"]]
                continue
            if isinstance(message, dict):
                admission = Admission(*message["admission"])
                self.num_running, self._num_waiting_there = (
                    admission.num_running,
                    admission.num_waiting,
                )
                # None in turns
                found = dict(zip(admission.admitted, admission.num_found, strict=False))
                for seq_id in admission.admitted:
                    # Not cancelled meanwhile
                    if (begun := self._generations.get(seq_id)) is not None:
                        begun.has_begun.set()
                        begun.num_found[seq_id] = found.get(seq_id, 0)
                        self._observer = begun.observer
                        if begun.observer is not None:
                            begun.observer.admitted(self.last_progress_s - begun.entered_s[seq_id])
                continue
            report = parse_report(message)
            self.num_running, self._num_waiting_there = report.num_running, report.num_waiting
            self.kv_cache_usage = report.kv_cache_usage
            for event in report.events:
                self._deliver(event)
            self.queue.observe_step(report)
            self._send_next()
            if self._observer is not None:
                self._observer.stepped(report)
        self.death_notice = await self._describe_death()
        if self.on_death is not None:
            self.on_death(self.death_notice)
        for generation in set(self._generations.values()):
            generation.put(None)
        self._generations.clear()
        self._held = FairQueue()

    def _deliver(self, event: TokenEvent) -> None:
        self.num_failed_sequences += event.finish_reason is FinishReason.ERROR
        generation = self._generations.get(event.seq_id)
        if generation is None:  # cancelled while the step ran
            return
        self._observer = generation.observer
        self.queue.first_event(event.seq_id)
        if event.finish_reason is not None:
            del self._generations[event.seq_id]
            self.queue.leave(event.seq_id)
            self._enter_next(generation)
        generation.put(event)

    async def _describe_death(self) -> str:
        exit_code = await asyncio.to_thread(self._process.wait)
        return f"engine process {self.pid} ended with exit code {exit_code}; its own log says why"
