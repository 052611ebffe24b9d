"""A request without finite logits has the replica test itself: damaged weights end it, a single
request does not."""

import asyncio
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig
from model.generation.sampling_params import SamplingParams
from serving.engine.messages import FinishReason, SequenceRequest
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.engine_process.health import HealthCheck
from tests.serving.tiny_models import FRAGILE_POSITION


@pytest.mark.parametrize("weights_are_to_blame", [False, True])
def test_only_weights_that_fail_the_self_test_end_a_replica(
    fragile_checkpoint: Path, weights_are_to_blame: bool
) -> None:
    async def scenario() -> None:
        client = await EngineClient.start(
            fragile_checkpoint, config=EngineConfig(max_num_seqs=2), eos_id=None, threads=1
        )
        bad = [0] * (FRAGILE_POSITION + 1)
        health = HealthCheck(client, prompt_ids=bad if weights_are_to_blame else [0])
        try:
            health.check()
            request = SequenceRequest(client.next_seq_id(), bad, 1, SamplingParams(temperature=0.0))
            [event] = [event async for event in client.submit([request])]
            assert event.finish_reason is FinishReason.ERROR
            for _ in range(20):
                health.check()
                await asyncio.sleep(0.1)
        finally:
            await client.close()

    if weights_are_to_blame:
        with pytest.raises(EngineDiedError, match="self-test"):
            asyncio.run(scenario())
    else:
        asyncio.run(scenario())
