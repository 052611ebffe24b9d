"""The replica's side of the engine process: starts it, hands it sequences, spreads its reports over the requests."""

import asyncio
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from cluster.settings.serve import EngineConfig
from model.errors import UserError
from serving.engine.messages import (
    Admission,
    FinishReason,
    FrameBuffer,
    SequenceRequest,
    TokenEvent,
    encode_frame,
    parse_report,
    submit_message,
)
from serving.engine_process.child_process import start_child
from serving.engine_process.peer_watchdog import watch_peer
from serving.engine_process.sequence_queue import SequenceQueue

READ_BYTES = 1 << 16
SHUTDOWN_TIMEOUT_S = 5.0


class EngineDiedError(Exception):
    """The engine process has ended; no answer comes any more."""


class Generation:
    """The events of one request's sequences, in the order in which they happen, until each has finished."""

    def __init__(self, client: "EngineClient", seq_ids: Iterable[int]) -> None:
        self._client = client
        self._open = set(seq_ids)
        self._events: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self.has_begun = asyncio.Event()  # the engine has admitted one of its sequences, or has died

    def close(self) -> None:
        """Ends the sequences that still run: their slots are free for others from the next step."""
        for seq_id in list(self._open):
            self.cancel(seq_id)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Raises `EngineDiedError` when the engine does."""
        while self._open:
            event = await self._events.get()
            if event is None:
                raise EngineDiedError(self._client.death_notice)
            if event.seq_id in self._open:  # not one that was cancelled after this was sent
                if event.finish_reason is not None:
                    self._open.remove(event.seq_id)
                yield event

    def cancel(self, seq_id: int) -> None:
        self._open.discard(seq_id)
        self._client.cancel(seq_id)

    def put(self, event: TokenEvent | None) -> None:
        self.has_begun.set()
        self._events.put_nowait(event)


class EngineClient:
    """One engine process. All methods run in the event loop that `start` ran in."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        queue: SequenceQueue,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.queue = queue
        self._seq_ids = itertools.count()
        self._generations: dict[int, Generation] = {}  # by open sequence
        self._reports: asyncio.Task[None] | None = None
        self.num_running = 0
        self.num_waiting = 0
        self.kv_cache_usage = 0.0  # share of the blocks that are held
        self.num_failed_sequences = 0  # ended by logits that are not finite numbers
        self.last_progress_s = time.monotonic()  # a report, or work for an engine without any
        self.death_notice = ""
        self.on_death: Callable[[str], None] | None = None  # called with the notice, before any request learns of it

    @classmethod
    async def start(cls, checkpoint: Path, *, config: EngineConfig, eos_id: int | None, threads: int) -> "EngineClient":
        """Returns once the weights are loaded. Raises `UserError` for an unusable checkpoint."""
        arguments = {
            "--checkpoint": checkpoint.absolute(),
            "--config": config.model_dump_json(),
            "--threads": threads,
            "--eos-id": eos_id,
        }
        line, their_line = socket.socketpair()
        with their_line:
            client = cls(
                *await start_child(
                    "serving.engine_process.run_engine",
                    arguments | {"--watchdog": their_line.fileno()},
                    threads=threads,
                    pass_fds=[their_line.fileno()],
                    python=(config.backend == "vllm" and config.vllm_python) or sys.executable,
                ),
                queue=SequenceQueue(num_slots=config.max_num_seqs, tokens_per_step=config.prefill_tokens_per_step),
            )
        try:
            await client._wait_until_ready()
        except (UserError, EngineDiedError):
            line.close()
            await client.close()
            raise
        watch_peer(line, peer_pid=client.pid)
        client._reports = asyncio.create_task(client._dispatch_reports())
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self.death_notice

    @property
    def num_open_sequences(self) -> int:
        """Submitted and not ended: those that run and those that wait."""
        return len(self._generations)

    @property
    def num_open_requests(self) -> int:
        return len(set(self._generations.values()))

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    def submit(self, requests: list[SequenceRequest]) -> Generation:
        """Raises `EngineDiedError` when there is no engine."""
        if not self.alive:
            raise EngineDiedError(self.death_notice)
        if not self._generations:
            self.last_progress_s = time.monotonic()
        generation = Generation(self, [request.seq_id for request in requests])
        for request in requests:
            self._generations[request.seq_id] = generation
            self.queue.enter(request.seq_id, num_prompt_tokens=len(request.prompt_ids))
            self._writer.write(encode_frame(submit_message(request)))
        return generation

    def cancel(self, seq_id: int) -> None:
        if self._generations.pop(seq_id, None) is None:
            return
        self.queue.leave(seq_id)
        if self.alive:
            self._writer.write(encode_frame({"cancel": seq_id}))

    def kill(self) -> None:
        """For an engine that makes no progress."""
        self._process.kill()

    async def close(self) -> None:
        """Ends the process: it goes when its socket closes, or is killed."""
        self.on_death = None
        self._writer.close()
        try:
            await asyncio.to_thread(self._process.wait, SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _wait_until_ready(self) -> None:
        frames = FrameBuffer()
        while True:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise EngineDiedError(await self._describe_death())
            for message in frames.feed(data):
                if "error" in message:
                    raise UserError(message["error"])
                return

    async def _dispatch_reports(self) -> None:
        frames = FrameBuffer()
        while data := await self._read():
            for message in frames.feed(data):
                self.last_progress_s = time.monotonic()
                if isinstance(message, dict):
                    self._note(Admission(*message["admission"]))
                    continue
                report = parse_report(message)
                self.num_running, self.num_waiting = report.num_running, report.num_waiting
                self.kv_cache_usage = report.kv_cache_usage
                for event in report.events:
                    self._deliver(event)
                self.queue.observe_step(report)
        self.death_notice = await self._describe_death()
        if self.on_death is not None:
            self.on_death(self.death_notice)
        for generation in set(self._generations.values()):
            generation.put(None)
        self._generations.clear()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(READ_BYTES)
        except ConnectionError:  # killed with our commands unread
            return b""

    def _note(self, admission: Admission) -> None:
        self.num_running, self.num_waiting = admission.num_running, admission.num_waiting
        for seq_id in admission.admitted:
            if (generation := self._generations.get(seq_id)) is not None:  # not cancelled meanwhile
                generation.has_begun.set()

    def _deliver(self, event: TokenEvent) -> None:
        self.num_failed_sequences += event.finish_reason is FinishReason.ERROR
        generation = self._generations.get(event.seq_id)
        if generation is None:  # cancelled while the step ran
            return
        self.queue.first_event(event.seq_id)
        if event.finish_reason is not None:
            del self._generations[event.seq_id]
            self.queue.leave(event.seq_id)
        generation.put(event)

    async def _describe_death(self) -> str:
        exit_code = await asyncio.to_thread(self._process.wait)
        return f"engine process {self.pid} ended with exit code {exit_code}; its own log says why"
