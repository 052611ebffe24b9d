"""The shape of a decoder, GPT-2's or Llama's, in GPT-2's own terms, presets, counts of parameters and operations."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from model.tables import read_table

Architecture = Literal["gpt2", "llama"]

Activation = Literal["gelu", "gelu_exact", "relu", "swiglu"]
"""`gelu` is GPT-2's tanh approximation (`gelu_new` in Hugging Face), `gelu_exact` the erf form, `swiglu` is Llama's."""

_MOST = {"n_layer": 10_000}  # many times what was ever trained: a plan counts each block, of a typing error for minutes


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the decoder. Raises `ValueError` with the numbers when the fields do not fit together."""

    vocab_size: int = field(default=50257, metadata={"help": "number of token ids; a run takes it from its tokenizer"})
    n_positions: int = field(default=1024, metadata={"help": "context length in tokens"})
    n_layer: int = field(default=12, metadata={"help": "number of transformer blocks"})
    n_head: int = field(default=12, metadata={"help": "attention heads per block; divides n_embd"})
    n_kv_head: int | None = field(default=None, metadata={"help": "llama: heads of keys and values; n_head when unset"})
    n_embd: int = field(default=768, metadata={"help": "width of the residual stream"})
    n_inner: int | None = field(
        default=None, metadata={"help": "feed-forward width; when unset 4 x n_embd, for llama 8/3"}
    )
    activation_function: Activation = field(default="gelu", metadata={"help": "feed-forward activation"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "output head is the token embedding"})
    dropout: float = field(default=0.0, metadata={"help": "dropout probability in training, 0 <= p < 1"})
    layer_norm_epsilon: float = field(default=1e-5, metadata={"help": "epsilon inside the norms"})
    rope_theta: float = field(default=10000.0, metadata={"help": "llama: base of the rotary positions"})
    rope_factor: float = field(default=1.0, metadata={"help": "llama: how much slower the rotary positions turn"})
    rope_original_positions: int | None = field(
        default=None, metadata={"help": "llama: context length within which fast rotations stay as they are"}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of the initial weights"})
    architecture: Architecture = field(default="gpt2", metadata={"help": "gpt2, or llama: rotary positions, RMSNorm"})

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "ffn_width", "num_kv_heads"):
            value, most = getattr(self, name), _MOST.get(name, math.inf)
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}, expected at {'least 1' if value < 1 else f'most {most}'}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; choose one of its divisors")
        if self.architecture not in (known := get_args(Architecture)):
            raise ValueError(f"architecture is {self.architecture!r}, expected one of {', '.join(known)}")
        is_llama = self.architecture == "llama"
        if self.activation_function not in (
            known := tuple(n for n in get_args(Activation) if (n == "swiglu") == is_llama)
        ):
            found = f"activation_function is {self.activation_function!r}"
            raise ValueError(f"{found}, expected for {self.architecture}: {', '.join(known)}")
        if self.n_head % self.num_kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        for name in ("n_kv_head", "rope_theta", "rope_factor", "rope_original_positions"):
            if not is_llama and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} is a setting of architecture llama; gpt2 has none")
        if is_llama:  # a config.json has numbers
            for name, value in (("n_kv_head", self.num_kv_heads), ("n_inner", self.ffn_width)):
                object.__setattr__(self, name, value)
        if is_llama and self.head_dim % 2:
            raise ValueError(f"heads are {self.head_dim} wide, expected an even number: rotary positions turn pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= p < 1")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ffn_width(self) -> int:
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.architecture == "gpt2" else -(-8 * self.n_embd // 3 // 64) * 64

    @property
    def num_kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def kv_width(self) -> int:
        """The width of a token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim


def num_parameters(config: GPTConfig) -> int:
    """Returns the number of trainable parameters, embeddings included, a tied head counted once."""
    c, h = config.n_embd, config.ffn_width
    head = 0 if config.tie_word_embeddings else config.vocab_size * c
    if config.architecture == "llama":
        block = 2 * c + 2 * c * c + 2 * c * config.kv_width + 3 * c * h
        return config.vocab_size * c + config.n_layer * block + c + head
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (c * h + h) + (h * c + c)
    return config.vocab_size * c + config.n_positions * c + config.n_layer * block + 2 * c + head


PRESETS: dict[str, dict[str, Any]] = read_table(__file__, "presets")


def preset_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields in `values` over those of its `preset`. Raises `ValueError` for an unknown one."""
    values = dict(values)
    preset = values.pop("preset", None)
    if preset is not None and preset not in list(PRESETS):  # a file may hold a list, which has no hash
        raise ValueError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(GPTConfig)}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not a model setting, expected one of preset, {', '.join(sorted(known))}")
    return PRESETS.get(preset, {}) | values


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Counts forward and backward: 6 for each parameter that multiplies, and 12 x layers x width x seq_len for the
    attention scores and their use (PaLM, 2022, appendix B, which does not discount the causal half either).

    Position embeddings, and token embeddings beside an untied head, are looked up, not multiplied.
    """
    looked_up = config.n_positions * config.n_embd if config.architecture == "gpt2" else 0
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * config.n_embd
    return 6 * (num_parameters(config) - looked_up) + 12 * config.n_layer * config.n_embd * seq_len
