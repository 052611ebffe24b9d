"""The replica's side of the engine process: starts it, sends it sequences, gives its reports to the
requests."""

import asyncio
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from cluster.settings.serve import EngineConfig
from model.generation.sampling_params import SamplingParams
from raymill.errors import UserError
from serving.engine.messages import (
    Admission,
    EngineFacts,
    FinishReason,
    MetricFamily,
    SequenceRequest,
    StepReport,
    TokenEvent,
    encode_message,
)
from serving.engine_process.child_process import Lines, start_process
from serving.engine_process.fair_queue import FairQueue
from serving.engine_process.generation import Generation, ReportObserver
from serving.engine_process.peer_watchdog import watch_peer
from serving.engine_process.report_reader import MessageError, parse_message
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


class EngineClient:
    """One engine process. All methods run in the event loop of `start`.

    The engine takes sequences in the order in which they arrive there, so only those that it can
    soon start are sent. The others are held back here, in an order that is fair between API keys.
    """

    facts: EngineFacts
    queue: SequenceQueue

    _transport: asyncio.Transport

    def __init__(self, process: subprocess.Popen[bytes], *, python: str, max_adapters: int) -> None:
        self.python = python  # which runs it
        self.max_adapters = max_adapters
        self._process = process
        # What it says before all else; None if it ends before
        self._first: asyncio.Future[dict[str, Any] | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._fault = ""  # why it was ended
        self._seq_ids = itertools.count()
        self._weights = itertools.count(1)
        self.num_users = 1  # versions that it computes
        self.num_submitted = 0  # requests so far
        self._generations: dict[int, Generation] = {}  # by open sequence
        self._told: list[Generation] = []  # that have events of the latest reports
        self._unwritten: list[bytes] = []  # of this turn of the event loop
        self._held = FairQueue()
        self._ending: asyncio.Task[None] | None = None
        self.num_running = 0
        self._num_waiting_there = 0
        self.kv_cache_usage = 0.0  # share of the blocks that are held
        self.num_failed_sequences = 0  # ended by logits that are not finite numbers
        self._metrics: list[MetricFamily] = []
        self.last_progress_s = time.monotonic()  # of a report, or of new work for an idle engine
        self.death_notice = ""
        self._observer: ReportObserver | None = None  # of the sequences in the latest step
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
            process, ours = start_process(MODULE, arguments, pass_fds=fds, python=python)
        client = cls(process, python=python, max_adapters=config.max_adapters or 0)
        await client._connect(ours)
        # Not an argument, which every user of the machine sees: `vllm_args` may hold tokens
        client._send({"config": config.model_dump()})
        first = await client._first
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
        if not self._held:
            return len({*self._generations.values()}), len(self._generations), self.queue.wait_s()
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
        self._send({"weights": weights, "checkpoint": str(checkpoint.absolute())})
        return weights

    def submit(
        self,
        requests: Sequence[SequenceRequest],
        *,
        at_once: int | None = None,
        key: str = "",
        observer: ReportObserver | None = None,
    ) -> Generation:
        """Puts a request's sequences in line for the engine: `at_once` now, or all, and another one
        whenever one of them has ended. Raises `EngineDiedError` if the engine has died."""
        if not self.alive:
            raise EngineDiedError(self.death_notice)
        if not self._generations:
            self.last_progress_s = time.monotonic()
        self.num_submitted += 1
        generation = Generation(requests, cancel=self.cancel, key=key, observer=observer)
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
            self._send({"cancel": seq_id})
        self._enter_next(generation)
        self._send_next()

    def metrics(self) -> list[MetricFamily]:
        """Returns the engine's own metrics as the call before asked for them, and asks for new
        ones. The engine gives them between two steps, so a scrape never waits for a step."""
        if self.alive:
            self._send({"metrics": None})
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
        self._transport.close()
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
            self._write(submission(self._held.take()))

    async def _connect(self, end: socket.socket) -> None:
        self._transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: Lines(self._hear, on_end=self._end), sock=end
        )

    def _send(self, message: Any) -> None:
        self._write(encode_message(message))

    def _write(self, line: bytes) -> None:
        """Sends a line with all others of this turn: the engine wakes once for them."""
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_all)
        self._unwritten.append(line)

    def _write_all(self) -> None:
        self._transport.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def _hear(self, lines: list[bytes]) -> None:
        """Takes what the engine process says."""
        for line in lines:
            if self._first.done():
                self._take(line)
            else:
                self._first.set_result(json.loads(line))
        told, self._told = self._told, []
        for generation in told:
            generation.flush()

    def _take(self, line: bytes) -> None:
        """Takes one message. An engine that cannot be understood is ended."""
        try:
            message = parse_message(line)
        except MessageError as error:
            self._fault = self._fault or f"it was ended, as it had sent {error}"
            self.kill()
            return
        self.last_progress_s = time.monotonic()
        if isinstance(message, StepReport):
            self._take_report(message)
        elif isinstance(message, Admission):
            self._take_admission(message)
        else:
            self._metrics = message

    def _take_admission(self, admission: Admission) -> None:
        self.num_running, self._num_waiting_there = admission.num_running, admission.num_waiting
        # None in turns
        found = dict(zip(admission.admitted, admission.num_found, strict=False))
        for seq_id in admission.admitted:
            # Not cancelled meanwhile
            if (begun := self._generations.get(seq_id)) is not None:
                begun.begin(self.last_progress_s)
                begun.num_found[seq_id] = found.get(seq_id, 0)
                self._observer = begun.observer
                if begun.observer is not None:
                    begun.observer.admitted(self.last_progress_s - begun.entered_s[seq_id])

    def _take_report(self, report: StepReport) -> None:
        self.num_running, self._num_waiting_there = report.num_running, report.num_waiting
        self.kv_cache_usage = report.kv_cache_usage
        generations, unread = self._generations, self.queue.unread
        for event in report.events:
            seq_id = event.seq_id
            generation = generations.get(seq_id)
            if seq_id in unread or event.finish_reason is not None:
                self._pass_mark(event, generation)
            if generation is not None:  # not cancelled while the step ran
                if not generation.arrived:
                    self._told.append(generation)
                generation.arrived.append(event)
                self._observer = generation.observer
        self.queue.observe_step(report)
        if self._held:
            self._send_next()
        if self._observer is not None:
            self._observer.stepped(report)

    def _pass_mark(self, event: TokenEvent, generation: Generation | None) -> None:
        """Takes note of a sequence's first event, and of its end."""
        self.num_failed_sequences += event.finish_reason is FinishReason.ERROR
        if generation is None:
            return
        self.queue.first_event(event.seq_id)
        generation.begin(self.last_progress_s)
        if event.finish_reason is not None:
            del self._generations[event.seq_id]
            self.queue.leave(event.seq_id)
            self._enter_next(generation)

    def _end(self) -> None:
        """Begins once the socket is closed, by the engine's death or by `close`."""
        if not self._first.done():
            self._first.set_result(None)
        self._ending = asyncio.create_task(self._end_all())

    async def _end_all(self) -> None:
        self.death_notice = await self._describe_death()
        if self.on_death is not None:
            self.on_death(self.death_notice)
        for generation in set(self._generations.values()):
            generation.put_death(EngineDiedError(self.death_notice))
        self._generations.clear()
        self._held = FairQueue()

    async def _describe_death(self) -> str:
        exit_code = await asyncio.to_thread(self._process.wait)
        why = self._fault or "its own log says why"
        return f"engine process {self.pid} ended with exit code {exit_code}; {why}"
