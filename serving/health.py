"""Whether a replica should go on: its engine runs, and its weights give numbers."""

import asyncio

from model.sampling import SamplingParams
from serving.engine_client import EngineClient, EngineDiedError
from serving.messages import FinishReason, SequenceRequest


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
