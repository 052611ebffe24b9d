"""Weights that are replaced in a running vLLM compute what they compute in one that was started
with them."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine_process.client import EngineClient
from tests.checkpoints import into_shards
from tests.serving.delivery_parts import bad_checkpoint
from tests.serving.tiny_models import write_model
from tests.serving.vllm_parts import installed, memory_bytes, peak_memory, vllm_config

pytestmark = [installed, pytest.mark.slow]

GREEDY = SamplingParams(temperature=0.0)
MEMORY_RATIO = 1.25
LLAMA = {
    "architecture": "llama",
    "activation_function": "swiglu",
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 256,
}


def models(tokenizer: Tokenizer, *, num: int, tied: bool = True, **shape: Any) -> list[GPT]:
    found = []
    for seed in range(num):
        sizes = {"n_positions": 128, "n_layer": 2, "n_head": 2, "n_embd": 128} | shape
        gpt = GPT(
            GPTConfig(
                vocab_size=tokenizer.vocab_size,
                **sizes,
                initializer_range=0.2,
                tie_word_embeddings=tied,
            )
        )
        gpt.init_weights(seed)
        found.append(gpt.eval())
    return found


async def answers(
    client: EngineClient, prompts: list[list[int]], *, weights: int
) -> list[list[TokenEvent]]:
    generations = [
        client.submit(
            [
                SequenceRequest(
                    client.next_seq_id(),
                    p,
                    20,
                    GREEDY,
                    num_logprobs=3,
                    num_prompt_logprobs=0,
                    weights=weights,
                )
            ]
        )
        for p in prompts
    ]
    return [[event._replace(seq_id=0) async for event in generation] for generation in generations]


async def fresh_answers(
    folder: Path, config: EngineConfig, prompts: list[list[int]]
) -> list[list[TokenEvent]]:
    client = await EngineClient.start(folder, config=config, eos_id=None, threads=1)
    try:
        return await answers(client, prompts, weights=0)
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("dtype", "tied", "num_shards", "num_files", "shape"),
    [
        ("float32", True, 1, 1, {}),
        ("bfloat16", True, 1, 1, {}),
        ("float32", False, 1, 1, {}),
        ("float32", True, 2, 1, {}),
        ("float32", False, 1, 3, {}),
        ("bfloat16", False, 2, 1, LLAMA),
    ],
)
def test_replaced_weights_compute_what_a_fresh_engine_does(
    dtype: str,
    tied: bool,
    num_shards: int,
    num_files: int,
    shape: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    """Bit by bit: the tokens, their log-probabilities and the prompts', there and back again. The
    checkpoints are those of a run that goes on, with a training state."""
    found = models(tokenizer, num=2, tied=tied, **shape)
    folders = [
        write_model(tmp_path / f"step-{i}", gpt, tokenizer, step=i, to_train=True)
        for i, gpt in enumerate(found)
    ]
    if num_files > 1:
        expected_files = [path.name for path in folders[0].iterdir()]
        for folder in folders:
            into_shards(folder, num_files)
        assert [path.name for path in folders[0].iterdir()] != expected_files
    config = vllm_config(dtype=dtype, max_num_seqs=8, tensor_parallel_size=num_shards)

    async def scenario() -> None:
        expected = [await fresh_answers(folder, config, prompts) for folder in folders]
        assert expected[0] != expected[1]
        client = await EngineClient.start(folders[0], config=config, eos_id=None, threads=1)
        try:
            other = client.share(folders[1])
            for weights in (0, other, 0, other):
                assert await answers(client, prompts, weights=weights) == expected[weights > 0]
        finally:
            client.num_users = 1
            await client.close()

    asyncio.run(scenario())


def test_a_checkpoint_that_does_not_fit_changes_nothing(
    tokenizer: Tokenizer, prompts: list[list[int]], tmp_path: Path
) -> None:
    folders = [
        write_model(
            tmp_path / f"layers-{n_layer}", *models(tokenizer, num=1, n_layer=n_layer), tokenizer
        )
        for n_layer in (2, 3)
    ]
    nan = bad_checkpoint("nan", tmp_path, folders[0], tokenizer)

    def ends(found: Sequence[Sequence[TokenEvent]]) -> set[FinishReason | None]:
        return {events[-1].finish_reason for events in found}

    async def scenario() -> None:
        client = await EngineClient.start(folders[0], config=vllm_config(), eos_id=None, threads=1)
        try:
            before = await answers(client, prompts[:3], weights=0)
            deeper, broken = client.share(folders[1]), client.share(nan)
            assert ends(await answers(client, prompts[:3], weights=deeper)) == {FinishReason.ERROR}
            assert await answers(client, prompts[:3], weights=0) == before
            assert ends(await answers(client, prompts[:3], weights=broken)) == {FinishReason.ERROR}
            assert await answers(client, prompts[:3], weights=0) == before
        finally:
            client.num_users = 1
            await client.close()

    asyncio.run(scenario())


def test_the_engine_keeps_to_its_own_memory(
    tokenizer: Tokenizer, prompts: list[list[int]], tmp_path: Path
) -> None:
    """With weights that are most of it: 85 million parameters and a small cache."""
    large = models(tokenizer, num=2, n_layer=12, n_head=12, n_embd=768)
    folders = [
        write_model(tmp_path / f"step-{i}", gpt, tokenizer, step=i) for i, gpt in enumerate(large)
    ]
    weights_bytes = (folders[0] / "model.safetensors").stat().st_size

    async def scenario() -> None:
        client = await EngineClient.start(
            folders[0], config=vllm_config(dtype="float32"), eos_id=None, threads=1
        )
        process = psutil.Process(client.pid)
        try:
            await answers(client, prompts, weights=0)
            before = memory_bytes(process)
            other = client.share(folders[1])
            with peak_memory(process) as peak:
                began_s = time.monotonic()
                for weights in (other, 0, other, 0):
                    await answers(client, prompts[:1], weights=weights)
                took_s = (time.monotonic() - began_s) / 4
            ratio, after = peak.bytes / before, memory_bytes(process)
            print(
                f"{weights_bytes / 1e6:.0f} MB of weights, {before / 1e6:.0f} MB in memory, "
                f"at most {ratio:.3f} times as much, {after / before:.3f} times at the end; {took_s:.2f} s each"
            )
            assert ratio < MEMORY_RATIO
        finally:
            client.num_users = 1
            await client.close()

    asyncio.run(scenario())
