"""Checks that a replica is healthy: its engine runs and makes progress, and its weights give finite
numbers."""

import asyncio
import os
import sys
import time
from typing import NoReturn

from serving.engine.messages import FinishReason
from serving.engine_process.client import EngineClient, EngineDiedError

STALLED_S = 60.0  # the longest step: a prompt that fills the context of a large model


def leave(death_notice: str) -> NoReturn:
    """Ends this replica at once after its engine has died. Requests without a first byte then go to
    another replica. A replica that stayed until Ray Serve had checked it three times would refuse
    them and, by its speed, attract more."""
    sys.stderr.write(f"{death_notice}; the replica ends with it\n")
    sys.stderr.flush()
    os._exit(1)


class HealthCheck:
    """After a request with NaN logits, a self-test decides what was at fault. Damaged weights fail
    it too, and the replica is replaced. Otherwise it was the request, so that no client can end a
    replica with a prompt."""

    def __init__(self, engine: EngineClient, *, prompt_ids: list[int], weights: int = 0) -> None:
        self._engine = engine
        self._weights = weights
        self._prompt_ids = prompt_ids
        self._num_failures_seen = 0
        self._retest: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Runs every second. Raises `EngineDiedError` if the replica has to be replaced."""
        if not self._engine.alive:
            raise EngineDiedError(self._engine.death_notice)
        if (
            self._engine.num_open_sequences
            and time.monotonic() - self._engine.last_progress_s > STALLED_S
        ):
            self._engine.kill()
        if self._retest is not None and self._retest.done():
            self._retest.result()
            self._retest = None
        if self._retest is None and self._engine.num_failed_sequences > self._num_failures_seen:
            self._num_failures_seen = self._engine.num_failed_sequences
            self._retest = asyncio.create_task(self.self_test())

    async def self_test(self) -> None:
        """Draws one greedy token, so that weights that give NaN are never served. Raises
        `EngineDiedError`."""
        request = self._engine.own_sequence(self._prompt_ids, max_tokens=1, weights=self._weights)
        async for event in self._engine.submit([request]):
            if event.finish_reason is FinishReason.ERROR:
                raise EngineDiedError(
                    "the model fails its self-test: its logits are not finite numbers, or its weights could not be "
                    "loaded, and then the engine's log says why"
                )
