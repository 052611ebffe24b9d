"""The shape of a GPT-2 style decoder, in GPT-2's own terms, its presets, and counts of parameters and operations."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from model.tables import read_table

Activation = Literal["gelu", "gelu_exact", "relu"]
"""`gelu` is GPT-2's tanh approximation (`gelu_new` in Hugging Face), `gelu_exact` the erf form."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the decoder. Raises `ValueError` with the numbers when the fields do not fit together."""

    vocab_size: int = field(default=50257, metadata={"help": "number of token ids; a run takes it from its tokenizer"})
    n_positions: int = field(default=1024, metadata={"help": "context length in tokens"})
    n_layer: int = field(default=12, metadata={"help": "number of transformer blocks"})
    n_head: int = field(default=12, metadata={"help": "attention heads per block; divides n_embd"})
    n_embd: int = field(default=768, metadata={"help": "width of the residual stream"})
    n_inner: int | None = field(default=None, metadata={"help": "feed-forward width; 4 x n_embd when unset"})
    activation_function: Activation = field(default="gelu", metadata={"help": "feed-forward activation"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "output head is the token embedding"})
    dropout: float = field(default=0.0, metadata={"help": "dropout probability in training, 0 <= p < 1"})
    layer_norm_epsilon: float = field(default=1e-5, metadata={"help": "epsilon inside the LayerNorms"})
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of the initial weights"})

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; choose one of its divisors")
        if self.activation_function not in (known := get_args(Activation)):
            raise ValueError(f"activation_function is {self.activation_function!r}, expected one of {', '.join(known)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= p < 1")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ffn_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


def num_parameters(config: GPTConfig) -> int:
    """Returns the number of trainable parameters, embeddings included, a tied head counted once."""
    c, h = config.n_embd, config.ffn_width
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (c * h + h) + (h * c + c)
    head = 0 if config.tie_word_embeddings else config.vocab_size * c
    return config.vocab_size * c + config.n_positions * c + config.n_layer * block + 2 * c + head


PRESETS: dict[str, dict[str, Any]] = read_table(__file__, "presets")


def preset_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields in `values` over those of its `preset`. Raises `ValueError` for an unknown one."""
    values = dict(values)
    preset = values.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(GPTConfig)}
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r} is not a model setting, expected one of preset, {', '.join(sorted(known))}")
    return PRESETS.get(preset, {}) | values


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Counts forward and backward: 6 for each parameter that multiplies, and 12 x layers x width x seq_len for the
    attention scores and their use (PaLM, 2022, appendix B, which does not discount the causal half either).

    Position embeddings, and token embeddings beside an untied head, are looked up, not multiplied.
    """
    looked_up = config.n_positions * config.n_embd
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * config.n_embd
    return 6 * (num_parameters(config) - looked_up) + 12 * config.n_layer * config.n_embd * seq_len
