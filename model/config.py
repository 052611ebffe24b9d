"""The shape of a decoder, GPT-2's or Llama's, in GPT-2's own terms, presets, and what both kinds of
shape have in common."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from model.adapters.lora import Adapter
from model.architecture import (
    ARCHITECTURES,
    Activation,
    Architecture,
    ArchitectureName,
    KeptValues,
    Parameter,
)
from model.foreign_config import ForeignConfig
from model.tables import read_table

# Far above any real model: `plan` loops over blocks, so a typing error would hang it for minutes
_MOST = {"n_layer": 10_000}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the decoder. Raises `ValueError` with the numbers when the fields do not fit
    together."""

    by_transformers: ClassVar[bool] = False
    """Whether transformers' own modules compute it."""
    adapter: ClassVar[Adapter | None] = None
    num_experts: ClassVar[int] = 0

    vocab_size: int = field(
        default=50257, metadata={"help": "number of token ids; a run takes it from its tokenizer"}
    )
    n_positions: int = field(default=1024, metadata={"help": "context length in tokens"})
    n_layer: int = field(default=12, metadata={"help": "number of transformer blocks"})
    n_head: int = field(default=12, metadata={"help": "attention heads per block; divides n_embd"})
    n_kv_head: int | None = field(
        default=None, metadata={"help": "llama: heads of keys and values; n_head when unset"}
    )
    n_embd: int = field(default=768, metadata={"help": "width of the residual stream"})
    n_inner: int | None = field(
        default=None, metadata={"help": "feed-forward width; when unset 4 x n_embd, for llama 8/3"}
    )
    activation_function: Activation = field(
        default="gelu", metadata={"help": "feed-forward activation"}
    )
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "output head is the token embedding"}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "dropout probability in training, 0 <= p < 1"}
    )
    layer_norm_epsilon: float = field(default=1e-5, metadata={"help": "epsilon inside the norms"})
    rope_theta: float = field(
        default=10000.0, metadata={"help": "llama: base of the rotary positions"}
    )
    rope_factor: float = field(
        default=1.0, metadata={"help": "llama: how much slower the rotary positions turn"}
    )
    rope_original_positions: int | None = field(
        default=None,
        metadata={"help": "llama: context length within which fast rotations stay as they are"},
    )
    initializer_range: float = field(
        default=0.02, metadata={"help": "standard deviation of the initial weights"}
    )
    architecture: ArchitectureName = field(
        default="gpt2", metadata={"help": "gpt2, or llama: rotary positions, RMSNorm"}
    )

    def __post_init__(self) -> None:
        # A file may hold a list, which has no hash
        if self.architecture not in list(ARCHITECTURES):
            raise ValueError(
                f"architecture is {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}"
            )
        for name in (
            "vocab_size",
            "n_positions",
            "n_layer",
            "n_head",
            "n_embd",
            "ffn_width",
            "num_kv_heads",
        ):
            value, most = getattr(self, name), _MOST.get(name, math.inf)
            if not 1 <= value <= most:
                raise ValueError(
                    f"{name} is {value}, expected at {'least 1' if value < 1 else f'most {most}'}"
                )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; choose one of its divisors"
            )
        network = self.network
        if self.activation_function not in network.activations:
            raise ValueError(
                f"activation_function is {self.activation_function!r}, expected for {self.architecture}: "
                f"{', '.join(network.activations)}"
            )
        if self.n_head % self.num_kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        self._refuse_settings_of_others()
        if network.hf.has_all_sizes:
            for name, value in (("n_kv_head", self.num_kv_heads), ("n_inner", self.ffn_width)):
                object.__setattr__(self, name, value)
        if network.has_rotation and self.head_dim % 2:
            raise ValueError(
                f"heads are {self.head_dim} wide, expected an even number: rotary positions turn pairs"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= p < 1")

    def _refuse_settings_of_others(self) -> None:
        for other in ARCHITECTURES.values():
            for setting in fields(self):
                name = setting.name
                if name not in other.settings or name in self.network.settings:
                    continue
                if getattr(self, name) != setting.default:
                    raise ValueError(
                        f"{name} is a setting of architecture {other.name}; {self.architecture} has none"
                    )

    @property
    def network(self) -> Architecture:
        """The architecture's record."""
        return ARCHITECTURES[self.architecture]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ffn_width(self) -> int:
        return self.n_inner if self.n_inner is not None else self.network.ffn_width(self.n_embd)

    @property
    def num_kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def kv_width(self) -> int:
        """The width of a token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def model_type(self) -> str:
        """As config.json names the kind of model."""
        return self.architecture

    @property
    def num_parameters(self) -> int:
        """The trainable parameters, embeddings included, a tied head counted once."""
        names = self.network.parameters
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.n_embd
        around_blocks = _size(self, [*names.before.values(), *names.after.values()])
        return around_blocks + self.n_layer * _size(self, names.block.values()) + head

    @property
    def num_active_parameters(self) -> int:
        """The parameters that compute a token: all."""
        return self.num_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Counts forward and backward: 6 for each parameter that multiplies, and 12 x layers x width
        x seq_len for the attention scores and their use (PaLM, 2022, appendix B, which does not
        discount the causal half either).

        Position embeddings, and token embeddings beside an untied head, are looked up, not
        multiplied.
        """
        before = self.network.parameters.before.values()
        looked_up = _size(self, [parameter for parameter in before if parameter.is_looked_up])
        if not self.tie_word_embeddings:
            looked_up += self.vocab_size * self.n_embd
        return 6 * (self.num_parameters - looked_up) + 12 * self.n_layer * self.n_embd * seq_len

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """None: all weights are trained."""
        return {}

    @property
    def kept(self) -> KeptValues:
        """Values that a block keeps of each token for backward."""
        return self.network.kept

    def with_context(self, num_tokens: int) -> Self:
        """Returns the shape with a context of at most so many tokens."""
        return replace(self, n_positions=min(num_tokens, self.n_positions))

    def with_vocabulary(self, num_ids: int) -> Self:
        """Returns the shape for a tokenizer of so many ids."""
        return replace(self, vocab_size=num_ids)

    def as_settings(self) -> dict[str, Any]:
        """Returns what makes two shapes differ, by name."""
        return asdict(self)


Shape = GPTConfig | ForeignConfig
"""The shape of a model of ours, or of any in transformers. Both answer the same questions."""


def shape_differences(before: Shape, now: Shape) -> dict[str, tuple[Any, Any]]:
    """Returns both values of each setting that differs."""
    old, new = before.as_settings(), now.as_settings()
    differences: dict[str, tuple[Any, Any]] = {}
    for name in new | old:
        values = old.get(name), new.get(name)
        if values[0] != values[1]:
            differences[name] = values
    return differences


def lengths(config: GPTConfig) -> dict[str, int]:
    """Returns the length of each side that a parameter may have, by its `Dim`."""
    width = config.n_embd
    return {
        "C": width,
        "3C": 3 * width,
        "F": config.ffn_width,
        "G": config.kv_width,
        "V": config.vocab_size,
        "n_positions": config.n_positions,
    }


def _size(config: GPTConfig, parameters: Iterable[Parameter]) -> int:
    """Returns how many values the parameters have together."""
    sides = lengths(config)
    return sum(math.prod(map(sides.__getitem__, parameter.dims)) for parameter in parameters)


PRESETS: dict[str, dict[str, Any]] = read_table(__file__, "presets")


def preset_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields in `values` over the fields of its `preset`. Raises `ValueError` for an
    unknown one."""
    values = dict(values)
    preset = values.pop("preset", None)
    # A file may hold a list, which has no hash
    if preset is not None and preset not in list(PRESETS):
        close = difflib.get_close_matches(str(preset), PRESETS, n=1)
        meant = f"did you mean {close[0]}? There are" if close else "expected one of"
        raise ValueError(f"preset {preset!r} is unknown, {meant} {', '.join(PRESETS)}")
    known = {f.name for f in fields(GPTConfig)}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(
            f"{unknown[0]!r} is not a model setting, expected one of preset, {', '.join(sorted(known))}"
        )
    return PRESETS.get(preset, {}) | values
