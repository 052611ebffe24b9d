"""The shape and the bytes of every stage on a batch's way to the loss, and of the weights, from the config alone.

B sequences, T tokens of each, C = n_embd, H heads of width D = C / H, G = kv_width, F = ffn_width, V vocabulary, K
tokens of a chunk.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from model.config import GPTConfig, num_parameters
from model.tables import read_table

CHUNK_TOKENS = 1024
"""How many tokens' logits a CPU computes together."""

GPU_CHUNK_TOKENS = 8192
"""And a GPU: more of them make fewer sums of the head's gradient, each a pass over it."""


@dataclass(frozen=True)
class Stage:
    """A value that a forward pass makes, or a parameter."""

    name: str
    dims: str  # in the letters above
    shape: tuple[int, ...]
    bytes_per_value: int
    times: int = 1  # how many there are in one forward pass
    note: str = ""

    @property
    def num_bytes(self) -> int:
        """The bytes of one of them."""
        return math.prod(self.shape) * self.bytes_per_value


def stages(config: GPTConfig, *, batch_size: int, seq_len: int, bytes_per_value: int = 4) -> list[Stage]:
    """Returns the stages in the order of the forward pass; a block's are listed once and count `n_layer` times.

    With autocast to bf16 (`bytes_per_value` 2) the residual stream, LayerNorms and the loss keep fp32.
    """
    layers, small, head_dim = config.n_layer, bytes_per_value, config.head_dim
    num_tokens = batch_size * seq_len
    chunk = min(CHUNK_TOKENS, num_tokens)
    lengths = _lengths(config) | {"B": batch_size, "T": seq_len, "H": config.n_head, "D": head_dim, "K": chunk}
    is_llama = config.architecture == "llama"
    norm, added = ("RMSNorm", "of tokens") if is_llama else ("LayerNorm", "of tokens and positions, added")
    one = ("block: query, key, value", "B T 3C", small, layers, "")
    three = [("block: query", "B T C", small, layers, ""), ("block: key, value", "B T G", small, 2 * layers, "")]
    gate = [("block: feed-forward, gate", "B T F", small, layers, "")]
    rows = [
        ("token ids", "B T", 8, 1, ""),
        ("embeddings", "B T C", 4, 1, f"{added}: the residual stream"),
        (f"block: {norm} 1", "B T C", 4, layers, ""),
        *(three if is_llama else [one]),
        ("block: each in heads", "B H T D", small, 3 * layers, "a view"),
        ("block: scores", "B H T T", small, layers, f"over sqrt({head_dim}); never whole"),
        ("block: attention", "B H T D", small, layers, ""),
        ("block: projection", "B T C", small, layers, "added to the residual stream"),
        (f"block: {norm} 2", "B T C", 4, layers, ""),
        *(gate if is_llama else []),
        ("block: feed-forward, up", "B T F", small, layers, ""),
        (f"block: {config.activation_function}", "B T F", small, layers, ""),
        ("block: feed-forward, down", "B T C", small, layers, "added to the residual stream"),
        (f"last {norm}", "B T C", 4, 1, ""),
        ("logits", "B T V", 4, 1, "never whole"),
        ("logits, a chunk", "V K", small, -(-num_tokens // chunk), "all of them that exist at a time"),
        ("loss", "", 4, 1, ""),
    ]
    return [Stage(name, dims, _shape(dims, lengths), size, times, note) for name, dims, size, times, note in rows]


def weights(config: GPTConfig) -> list[Stage]:
    """Returns the parameters, in fp32; a block's are listed once and count `n_layer` times."""
    lengths = _lengths(config)
    found = [
        Stage(
            name.removeprefix("transformer.").removeprefix("model."),
            dims,
            _shape(dims, lengths),
            4,
            config.n_layer if "*" in name else 1,
        )
        for name, dims in _parameter_dims(config, layers="*").items()
    ]
    assert sum(stage.times * math.prod(stage.shape) for stage in found) == num_parameters(config)
    return found


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its name, in the order of `GPT.named_parameters`; a tied head has none."""
    lengths = _lengths(config)
    return {name: _shape(dims, lengths) for name, dims in _parameter_dims(config, layers=range(config.n_layer)).items()}


def _parameter_dims(config: GPTConfig, *, layers: Iterable[object]) -> dict[str, str]:
    block: dict[str, str] = read_table(__file__, "shapes")[config.architecture]
    head = {} if config.tie_word_embeddings else {"lm_head.weight": "V C"}
    if config.architecture == "llama":
        blocks = {f"model.layers.{layer}.{name}": dims for layer in layers for name, dims in block.items()}
        return {"model.embed_tokens.weight": "V C"} | blocks | {"model.norm.weight": "C"} | head
    decoder = {"wte.weight": "V C", "wpe.weight": "n_positions C"}
    decoder |= {f"h.{layer}.{name}": dims for layer in layers for name, dims in block.items()}
    decoder |= {"ln_f.weight": "C", "ln_f.bias": "C"}
    return {f"transformer.{name}": dims for name, dims in decoder.items()} | head


def _lengths(config: GPTConfig) -> dict[str, int]:
    c, lengths = config.n_embd, {"G": config.kv_width, "V": config.vocab_size, "n_positions": config.n_positions}
    return lengths | {"C": c, "3C": 3 * c, "F": config.ffn_width}


def _shape(dims: str, lengths: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(lengths[letter] for letter in dims.split())
