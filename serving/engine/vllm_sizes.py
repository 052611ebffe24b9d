"""Sizes and sampling arguments for vLLM, started sequences and the seeds that they spend: nothing
here imports vLLM."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cluster.settings.serve import EngineConfig
from model.config import Shape
from model.generation.sampling_params import SamplingParams
from serving.engine.kv_cache_size import served_context

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
SPARE_BLOCKS = 8  # vLLM keeps one for itself and cuts off the last
BLOCK_TOKENS = 128  # vLLM's largest, on CPUs


def cache_bytes(shape: Shape, config: EngineConfig, num_seqs: int | None) -> int | None:
    """Returns the bytes on each device for as many tokens as our engine has room for. None, on a
    GPU without a setting, lets vLLM decide. Heads of keys and values are split over the devices;
    each has one at least."""
    on_cpu = (
        num_seqs * served_context(shape, config.max_context)
        if num_seqs and config.device == "cpu"
        else None
    )
    num_tokens = config.kv_cache_tokens or on_cpu
    if num_tokens is None:
        return None
    num_blocks = -(-num_tokens // BLOCK_TOKENS) + SPARE_BLOCKS
    num_heads = -(-shape.num_kv_heads // config.tensor_parallel_size)
    return (
        num_blocks
        * BLOCK_TOKENS
        * 2
        * shape.n_layer
        * num_heads
        * shape.head_dim
        * NUMBER_BYTES[config.dtype]
    )


def batched_tokens(
    num_prompt_tokens: int | None, num_seqs: int | None, extra: Mapping[str, Any]
) -> int | None:
    """Returns the tokens that a step may compute: of prompts as asked, and one for each sequence.
    None lets vLLM decide. vLLM reads a longer prompt in chunks, unless `extra`, its further
    arguments, forbids it."""
    if num_prompt_tokens is None or extra.get("enable_chunked_prefill") is False:
        return None
    return num_prompt_tokens + (num_seqs or 0)


def sampling_arguments(sampling: SamplingParams) -> dict[str, Any]:
    """Returns what vLLM's `SamplingParams` are given of ours: each by its name, as the two need not
    have the same."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,  # vLLM's word for all
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": sampling.seed,
    }


def spare_generators(worker: Any) -> None:
    """Runs in each worker on CPUs: a sequence that has not read all of its tokens draws without the
    generator of its seed. vLLM 0.32 throws that draw away and then turns the generator back, which
    CPU generators refuse, so that its process would end."""
    runner = worker.model_runner
    sample_tokens = runner.sample_tokens

    def sample(grammar_output: Any) -> Any:
        batch = runner.input_batch
        thrown_away = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {row: batch.generators.pop(row) for row in thrown_away if row in batch.generators}
        output = sample_tokens(grammar_output)
        batch.generators.update(spared)
        return output

    runner.sample_tokens = sample


class Starts:
    """Which sequences have been started. vLLM's plans name one again that was preempted and goes
    on."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def fresh(self, seq_ids: Iterable[int]) -> list[int]:
        """Returns the sequences that start for the first time."""
        fresh = [seq_id for seq_id in seq_ids if seq_id not in self._known]
        self._known.update(fresh)
        return fresh

    def forget(self, seq_id: int) -> None:
        """Forgets a sequence that has ended."""
        self._known.discard(seq_id)
