"""Decides how many tokens the KV cache of raymill's engine holds: as set, or as many as the free
memory allows."""

from typing import NamedTuple

from cluster.settings.serve import EngineConfig
from model.config import Shape
from raymill.errors import UserError
from serving.engine.block_pool import BLOCK_TOKENS
from serving.structured.grammar_memory import MOST_BYTES

# Of the free memory, of a default cache: during a promotion a second engine takes as much
SHARE = 0.4
GRAMMAR_SHARE = 1 / 8  # of the free memory, where that is less than grammars may take else
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}  # of a key or value, by `engine.dtype`
GIB = 1 << 30

_LANES = 16  # numbers; the kernels pad a head to whole vectors


class Memory(NamedTuple):
    """Memory that this process may take."""

    free_bytes: int  # now, before anything is swapped or ended
    total_bytes: int


def bytes_per_token(shape: Shape, dtype: str) -> int:
    """Returns the bytes of a token's keys and values in all layers."""
    head_width = -(-shape.head_dim // _LANES) * _LANES
    return 2 * shape.n_layer * shape.num_kv_heads * head_width * NUMBER_BYTES[dtype]


def served_context(shape: Shape, max_context: int | None) -> int:
    """Returns the tokens of a sequence that are served at most. Raises `UserError` for more than
    the model has."""
    if max_context is not None and max_context > shape.n_positions:
        raise UserError(
            f"engine.max_context={max_context} is more than the context of this model, {shape.n_positions} tokens"
        )
    return max_context or shape.n_positions


def grammar_bytes(memory: Memory) -> int:
    """Returns the bytes that all grammars of an engine may take."""
    return min(MOST_BYTES, int(GRAMMAR_SHARE * memory.free_bytes))


def kv_cache_tokens(
    shape: Shape,
    config: EngineConfig,
    *,
    dtype: str,
    num_seqs: int,
    other_bytes: int,
    memory: Memory,
) -> int:
    """Returns the tokens for which the cache has room. `other_bytes` are still to be taken for the
    weights and for grammars. Raises `UserError`, with the bytes, where not even one context fits, or what is set
    never could."""
    context = served_context(shape, config.max_context)
    token_bytes = bytes_per_token(shape, dtype)
    if config.kv_cache_tokens is not None:
        _require_possible(config.kv_cache_tokens, context, token_bytes, memory)
        return config.kv_cache_tokens
    room_bytes = int(SHARE * max(0, memory.free_bytes - other_bytes))
    fitting = room_bytes // token_bytes // BLOCK_TOKENS * BLOCK_TOKENS
    if fitting < context:
        raise UserError(
            f"one context of this model, {context} tokens, takes {context * token_bytes / GIB:.2f} GiB of KV cache, "
            f"and {room_bytes / GIB:.2f} GiB are there for it ({SHARE:.0%} of what weights and grammars leave free): "
            f"set engine.max_context to at most {fitting}, or give the replica more memory"
        )
    return min(num_seqs * context, fitting)


def _require_possible(num_tokens: int, context: int, token_bytes: int, memory: Memory) -> None:
    if num_tokens < context:
        raise UserError(
            f"engine.kv_cache_tokens={num_tokens} is less than one context of this model, {context} tokens; "
            "engine.max_context serves a shorter one"
        )
    if num_tokens * token_bytes > memory.total_bytes:
        raise UserError(
            f"engine.kv_cache_tokens={num_tokens} takes {num_tokens * token_bytes / GIB:.2f} GiB, and this machine or "
            f"container has {memory.total_bytes / GIB:.2f} GiB in all"
        )
