"""Whether a replica should go on: its engine runs and makes progress, and its weights give numbers."""

import asyncio
import os
import sys
import time
from typing import NoReturn

from model.sampling import SamplingParams
from serving.engine.messages import FinishReason, SequenceRequest
from serving.engine_process.client import EngineClient, EngineDiedError

STALLED_S = 60.0  # the longest step: a prompt that fills the context of a large model


def leave(death_notice: str) -> NoReturn:
    """Ends this replica with its engine, and at once. What waits for a first byte is then given to another replica,
    while a replica that stays until Ray Serve has looked three times would refuse it, and attract more by its haste."""
    sys.stderr.write(f"{death_notice}; the replica ends with it\n")
    sys.stderr.flush()
    os._exit(1)


class HealthCheck:
    """After a request whose logits were not finite numbers the self-test decides who is to blame. Damaged weights fail
    it too, and the replica is replaced. Otherwise the request was, and no client can end a replica with it."""

    def __init__(self, engine: EngineClient, *, prompt_ids: list[int]) -> None:
        self._engine = engine
        self._prompt_ids = prompt_ids
        self._num_failures_seen = 0
        self._retest: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Asked every second. Raises `EngineDiedError` for a replica to be replaced."""
        if not self._engine.alive:
            raise EngineDiedError(self._engine.death_notice)
        if self._engine.num_open_sequences and time.monotonic() - self._engine.last_progress_s > STALLED_S:
            self._engine.kill()
        if self._retest is not None and self._retest.done():
            self._retest.result()
            self._retest = None
        if self._retest is None and self._engine.num_failed_sequences > self._num_failures_seen:
            self._num_failures_seen = self._engine.num_failed_sequences
            self._retest = asyncio.create_task(self.self_test())

    async def self_test(self) -> None:
        """One greedy token: weights that load but give no finite logits are never served. Raises `EngineDiedError`."""
        request = SequenceRequest(
            seq_id=self._engine.next_seq_id(),
            prompt_ids=self._prompt_ids,
            max_tokens=1,
            sampling=SamplingParams(temperature=0.0),
        )
        async for event in self._engine.submit([request]):
            if event.finish_reason is FinishReason.ERROR:
                raise EngineDiedError("the model fails its self-test: its logits are not finite numbers")
