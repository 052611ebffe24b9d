"""The size of the KV cache: whole contexts where memory allows, less where it does not, and words
where nothing fits."""

import dataclasses

import pytest

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from raymill.errors import UserError
from serving.engine.kv_cache_size import SHARE, Memory, bytes_per_token, kv_cache_tokens
from serving.engine.vllm_sizes import (
    BLOCK_TOKENS,
    SPARE_BLOCKS,
    Starts,
    batched_tokens,
    cache_bytes,
    sampling_arguments,
)

SMOLLM2 = GPTConfig(
    architecture="llama", activation_function="swiglu", vocab_size=49152, n_positions=8192, n_layer=30, n_head=9,
    n_kv_head=3, n_embd=576,
)  # fmt: skip
LLAMA_1B = dataclasses.replace(
    SMOLLM2, n_positions=131072, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_inner=8192
)
GIB = 1 << 30


def tokens(
    shape: GPTConfig,
    *,
    free_gib: float,
    total_gib: float = 64,
    weights_gib: float = 0,
    **settings: int,
) -> int:
    config = EngineConfig.model_validate(settings)
    room = Memory(int(free_gib * GIB), int(total_gib * GIB))
    return kv_cache_tokens(
        shape,
        config,
        dtype="float32",
        num_seqs=16,
        other_bytes=int(weights_gib * GIB),
        memory=room,
    )


def test_a_tokens_bytes_are_those_of_its_key_and_value_heads() -> None:
    assert bytes_per_token(SMOLLM2, "float32") == 2 * 30 * 3 * 64 * 4
    assert (
        bytes_per_token(SMOLLM2, "int8")
        == bytes_per_token(SMOLLM2, "bfloat16")
        == 2 * 30 * 3 * 64 * 2
    )


def test_the_default_is_whole_contexts_where_they_fit() -> None:
    assert tokens(SMOLLM2, free_gib=64) == 16 * 8192


def test_in_a_pod_of_six_gigabytes_it_is_a_share_of_them() -> None:
    """On the old code it grew to 5.6 GiB beside the weights, until the kernel ended the pod."""
    held = tokens(SMOLLM2, free_gib=5, weights_gib=0.5)
    assert 8192 <= held < 16 * 8192
    assert held * bytes_per_token(SMOLLM2, "float32") <= SHARE * 4.5 * GIB


def test_without_room_for_one_context_the_error_names_bytes_and_what_to_set() -> None:
    with pytest.raises(
        UserError, match=r"131072 tokens, takes 8\.00 GiB.*set engine.max_context to at most (\d+)"
    ) as it:
        tokens(LLAMA_1B, free_gib=14, weights_gib=4.6)
    shorter = int(str(it.value).partition("at most ")[2].partition(",")[0])
    assert tokens(LLAMA_1B, free_gib=14, weights_gib=4.6, max_context=shorter) >= shorter


def test_a_shorter_context_needs_less_and_a_longer_one_is_refused() -> None:
    assert tokens(LLAMA_1B, free_gib=64, max_context=2048) == 16 * 2048
    assert tokens(LLAMA_1B, free_gib=64, max_context=2048, kv_cache_tokens=4096) == 4096
    with pytest.raises(
        UserError, match="max_context=8193 is more than the context of this model, 8192"
    ):
        tokens(SMOLLM2, free_gib=64, max_context=8193)
    with pytest.raises(UserError, match="kv_cache_tokens=4096 is less than one context"):
        tokens(SMOLLM2, free_gib=64, kv_cache_tokens=4096)


def test_what_is_set_is_refused_only_if_it_never_fits() -> None:
    assert tokens(SMOLLM2, free_gib=1, kv_cache_tokens=131072) == 131072
    with pytest.raises(
        UserError, match=r"takes 5\.62 GiB, and this machine or container has 4\.00 GiB in all"
    ):
        tokens(SMOLLM2, free_gib=1, total_gib=4, kv_cache_tokens=131072)


def test_vllms_cache_has_the_bytes_of_key_and_value_heads() -> None:
    """On the old code those of all heads: three times as many for this shape."""
    config = EngineConfig(backend="vllm", kv_cache_tokens=8192, dtype="bfloat16")
    blocks = 8192 // BLOCK_TOKENS + SPARE_BLOCKS
    assert cache_bytes(SMOLLM2, config, 16) == blocks * BLOCK_TOKENS * 2 * 30 * 3 * 64 * 2
    halved = config.model_copy(update={"tensor_parallel_size": 2})
    assert cache_bytes(SMOLLM2, halved, 16) == blocks * BLOCK_TOKENS * 2 * 30 * 2 * 64 * 2
    shorter = EngineConfig(backend="vllm", max_context=1024, dtype="bfloat16")
    assert (
        cache_bytes(SMOLLM2, shorter, 16)
        == (16 * 1024 // BLOCK_TOKENS + SPARE_BLOCKS) * BLOCK_TOKENS * 23040
    )


def test_vllm_reads_as_many_tokens_at_once_as_asked() -> None:
    """On the old code never fewer than the whole context."""
    assert batched_tokens(96, 16, {}) == 112
    assert batched_tokens(None, 16, {}) is None
    assert batched_tokens(96, 16, {"enable_chunked_prefill": False}) is None


def test_sampling_arguments__have_every_field_of_ours_by_name() -> None:
    sampling = SamplingParams(top_k=5, logit_bias=((3, 1.5),), seed=7, min_p=0.25)
    arguments = sampling_arguments(sampling)
    assert arguments.keys() == vars(sampling).keys()
    assert arguments == vars(sampling) | {"logit_bias": {3: 1.5}}
    defaults = sampling_arguments(SamplingParams())
    assert (defaults["top_k"], defaults["logit_bias"]) == (-1, None)


def test_sampling_arguments__leave_out_a_field_that_vllm_does_not_know() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LaterSamplingParams(SamplingParams):
        typical_p: float = 1.0

    assert sampling_arguments(LaterSamplingParams()) == sampling_arguments(SamplingParams())


def test_a_sequence_that_vllm_put_back_starts_once() -> None:
    starts = Starts()
    assert starts.fresh([1, 2]) == [1, 2]
    assert starts.fresh([2, 3]) == [3]
    starts.forget(2)
    assert starts.fresh([2]) == [2]
