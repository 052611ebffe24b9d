"""The shape and the bytes of every stage that a batch passes on its way to the loss, from a model's shape alone.

B sequences, T tokens of each, C = n_embd, H heads of width D = C / H, F = ffn_width, V vocabulary, K tokens of a chunk.
"""

import math
from dataclasses import dataclass

from model.config import GPTConfig, num_parameters

DEFAULT_CHUNK_TOKENS = 1024
"""Tokens whose logits are computed together."""

_ID_BYTES = 8


@dataclass(frozen=True)
class Stage:
    name: str
    dims: str  # in the letters above
    shape: tuple[int, ...]
    bytes_per_value: int
    times: int = 1  # of it in one forward pass
    note: str = ""

    @property
    def num_bytes(self) -> int:
        """Of one."""
        return math.prod(self.shape) * self.bytes_per_value


def stages(
    config: GPTConfig,
    *,
    batch_size: int,
    seq_len: int,
    bytes_per_value: int = 4,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> list[Stage]:
    """In the order of the forward pass; a block's stages stand once and count `n_layer` times.

    With autocast to bf16 (`bytes_per_value` 2) the residual stream, LayerNorms and the loss keep fp32.
    """
    b, t, c, h, v = batch_size, seq_len, config.n_embd, config.n_head, config.vocab_size
    d, f, layers, small = config.head_dim, config.ffn_width, config.n_layer, bytes_per_value
    chunk = min(chunk_tokens, b * t)
    return [
        Stage("token ids", "B T", (b, t), _ID_BYTES),
        Stage("embeddings", "B T C", (b, t, c), 4, note="of tokens and positions, added: the residual stream"),
        Stage("block: LayerNorm 1", "B T C", (b, t, c), 4, layers),
        Stage("block: query, key, value", "B T 3C", (b, t, 3 * c), small, layers),
        Stage("block: each in heads", "B H T D", (b, h, t, d), small, 3 * layers, "a view"),
        Stage("block: scores", "B H T T", (b, h, t, t), small, layers, f"over sqrt({d}); never whole"),
        Stage("block: attention", "B H T D", (b, h, t, d), small, layers),
        Stage("block: projection", "B T C", (b, t, c), small, layers, "added to the residual stream"),
        Stage("block: LayerNorm 2", "B T C", (b, t, c), 4, layers),
        Stage("block: feed-forward, up", "B T F", (b, t, f), small, layers),
        Stage(f"block: {config.activation_function}", "B T F", (b, t, f), small, layers),
        Stage("block: feed-forward, down", "B T C", (b, t, c), small, layers, "added to the residual stream"),
        Stage("last LayerNorm", "B T C", (b, t, c), 4),
        Stage("logits", "B T V", (b, t, v), 4, note="never whole"),
        Stage("logits, a chunk", "V K", (v, chunk), small, -(-b * t // chunk), "all of them that exist at a time"),
        Stage("loss", "", (), 4),
    ]


def weights(config: GPTConfig) -> list[Stage]:
    """The parameters, fp32; a projection's weight is (in, out), as GPT-2 stores it."""
    c, f, v, layers = config.n_embd, config.ffn_width, config.vocab_size, config.n_layer
    found = [
        Stage("wte", "V C", (v, c), 4, note="the head's too" if config.tie_word_embeddings else ""),
        Stage("wpe", "n_positions C", (config.n_positions, c), 4),
        Stage("h.*.ln_1, ln_2", "C", (c,), 4, 4 * layers, "weight and bias of each"),
        Stage("h.*.attn.c_attn.weight", "C 3C", (c, 3 * c), 4, layers),
        Stage("h.*.attn.c_attn.bias", "3C", (3 * c,), 4, layers),
        Stage("h.*.attn.c_proj.weight", "C C", (c, c), 4, layers),
        Stage("h.*.attn.c_proj.bias", "C", (c,), 4, layers),
        Stage("h.*.mlp.c_fc.weight", "C F", (c, f), 4, layers),
        Stage("h.*.mlp.c_fc.bias", "F", (f,), 4, layers),
        Stage("h.*.mlp.c_proj.weight", "F C", (f, c), 4, layers),
        Stage("h.*.mlp.c_proj.bias", "C", (c,), 4, layers),
        Stage("ln_f", "C", (c,), 4, 2, "weight and bias"),
    ]
    if not config.tie_word_embeddings:
        found.append(Stage("lm_head", "V C", (v, c), 4))
    assert sum(stage.times * math.prod(stage.shape) for stage in found) == num_parameters(config)
    return found


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its name, in the order of `GPT.named_parameters`; a tied head has none."""
    c, f, v = config.n_embd, config.ffn_width, config.vocab_size
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (c,),
        "ln_1.bias": (c,),
        "attn.c_attn.weight": (c, 3 * c),
        "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c),
        "attn.c_proj.bias": (c,),
        "ln_2.weight": (c,),
        "ln_2.bias": (c,),
        "mlp.c_fc.weight": (c, f),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (f, c),
        "mlp.c_proj.bias": (c,),
    }
    decoder: dict[str, tuple[int, ...]] = {"wte.weight": (v, c), "wpe.weight": (config.n_positions, c)}
    decoder |= {f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()}
    decoder |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (v, c)}
    return {f"transformer.{name}": shape for name, shape in decoder.items()} | head
