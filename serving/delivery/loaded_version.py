"""One version on one replica: its engine process, its model, and what it has done."""

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import resolve_checkpoint
from model.errors import UserError
from model.sampling_params import SamplingParams
from serving.delivery.promotion import Version, VersionStats
from serving.engine.messages import FinishReason, SequenceRequest
from serving.engine_process.client import EngineClient
from serving.engine_process.health import HealthCheck
from serving.protocol.served_model import ServedModel, read_served_model
from serving.xray.xray import Xray

DRAIN_POLL_S = 0.1
LONGEST_REQUEST_S = 600.0  # after this an unneeded engine ends, whatever still runs on it


class LoadedVersion:
    """A version that can serve. `open_requests` counts the requests that may still use its engine."""

    def __init__(self, folder: Path, *, model: ServedModel, engine: EngineClient) -> None:
        self.model = model
        self.engine = engine
        self.xray = Xray(folder, name=model.name, dtype=engine.facts.dtype)
        self.health = HealthCheck(engine, prompt_ids=[0])
        self.open_requests = 0
        self.stats = VersionStats()

    @classmethod
    async def load(cls, version: Version, *, name: str, config: ServeConfig) -> "LoadedVersion":
        """Returns when the model answers. Raises `UserError` for an unusable checkpoint, and `EngineDiedError` for one
        that fails its self-test."""
        folder = await asyncio.to_thread(resolve_checkpoint, version.checkpoint, config.storage.uri)
        model = await asyncio.to_thread(read_served_model, folder, name=name)
        if model.version != version.version:
            raise UserError(f"{version.checkpoint} holds {model.version} now, but {version.version} was promoted")
        threads = config.replicas.threads_per_replica
        engine = await EngineClient.start(folder, config=config.engine, eos_id=model.eos_id, threads=threads)
        loaded = cls(folder, model=model, engine=engine)
        try:
            await loaded.health.self_test()
        except BaseException:
            await loaded.close()
            raise
        return loaded

    async def loss(self, rows: Sequence[Sequence[int]]) -> float:
        """Returns the nats per token over the rows, NaN if the logits are not finite. The rows are read one after the
        other, so that clients' tokens come in between."""
        logprobs: list[float] = []
        for row in rows:
            request = SequenceRequest(
                seq_id=self.engine.next_seq_id(),
                prompt_ids=list(row),
                max_tokens=0,
                sampling=SamplingParams(temperature=0.0),
                num_prompt_logprobs=0,
            )
            async for event in self.engine.submit([request]):
                if event.finish_reason is FinishReason.ERROR:
                    return math.nan
                logprobs += [token.logprob for token in event.prompt_logprobs or [] if token is not None]
        return -sum(logprobs) / len(logprobs)

    async def retire(self) -> None:
        """Ends the engine once no request uses it."""
        deadline_s = time.monotonic() + LONGEST_REQUEST_S
        while self.open_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        await self.close()

    async def close(self) -> None:
        self.xray.close()
        await self.engine.close()
