"""The shape and the bytes of every stage on a batch's way to the loss, and of the weights, from the
config alone.

B sequences, T tokens of each, C = n_embd, H heads of width D = C / H, G = kv_width, F = ffn_width,
V vocabulary, K tokens of a chunk.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from model.architecture import HEAD, Parameter
from model.config import GPTConfig, Shape, lengths
from model.foreign_config import ForeignConfig
from raymill.rules.hidden_matrix import HiddenMatrix, hidden_matrices_by_name

_NUMBER = re.compile(r"\.\d+\.")
_OF_LAYER = re.compile(r"(^|\.)\d+\.")  # of a parameter that lies in one of several layers

if TYPE_CHECKING:  # shapes are counted without PyTorch
    pass

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


def stages(
    config: Shape, *, batch_size: int, seq_len: int, bytes_per_value: int = 4
) -> list[Stage]:
    """Returns the stages in the order of the forward pass; a block's are listed once and count
    `n_layer` times.

    With autocast to bf16 (`bytes_per_value` 2) the residual stream, LayerNorms and the loss keep
    fp32. Of a model of transformers only what lies between its layers is known.
    """
    num_tokens = batch_size * seq_len
    chunk = min(CHUNK_TOKENS, num_tokens)
    sides = {"B": batch_size, "T": seq_len, "H": config.n_head, "D": config.head_dim, "K": chunk}
    match config:
        case GPTConfig():
            sides |= lengths(config)
            names = config.network.stages
            embeddings, norm = f"{names.embeddings}: the residual stream", names.norm
            of_blocks = _stages_of_blocks(config, bytes_per_value)
        case ForeignConfig():
            sides |= {"C": config.n_embd, "V": config.vocab_size}
            embeddings, norm = "of tokens: the residual stream", "norm"
            of_blocks = [("block", "B T C", 4, config.n_layer, "as transformers computes it")]
        case _:
            assert_never(config)
    rows = [
        ("token ids", "B T", 8, 1, ""),
        ("embeddings", "B T C", 4, 1, embeddings),
        *of_blocks,
        (f"last {norm}", "B T C", 4, 1, ""),
        ("logits", "B T V", 4, 1, "never whole"),
        (
            "logits, a chunk",
            "V K",
            bytes_per_value,
            -(-num_tokens // chunk),
            "all of them that exist at a time",
        ),
        ("loss", "", 4, 1, ""),
    ]
    return [
        Stage(name, dims, _shape(dims.split(), sides), size, times, note)
        for name, dims, size, times, note in rows
    ]


def _stages_of_blocks(config: GPTConfig, small: int) -> list[tuple[str, str, int, int, str]]:
    """Returns name, dims, bytes of a value, times and note of what all blocks make together; `small`
    bytes has what autocast computes."""
    layers, names = config.n_layer, config.network.stages
    projections = [
        (f"block: {name}", dims, small, layers * count, "")
        for name, dims, count in names.projections
    ]
    gate = [("block: feed-forward, gate", "B T F", small, layers, "")] if names.has_gate else []
    return [
        (f"block: {names.norm} 1", "B T C", 4, layers, ""),
        *projections,
        ("block: each in heads", "B H T D", small, 3 * layers, "a view"),
        ("block: scores", "B H T T", small, layers, f"over sqrt({config.head_dim}); never whole"),
        ("block: attention", "B H T D", small, layers, ""),
        ("block: projection", "B T C", small, layers, "added to the residual stream"),
        (f"block: {names.norm} 2", "B T C", 4, layers, ""),
        *gate,
        ("block: feed-forward, up", "B T F", small, layers, ""),
        (f"block: {config.activation_function}", "B T F", small, layers, ""),
        ("block: feed-forward, down", "B T C", small, layers, "added to the residual stream"),
    ]


def weights(config: Shape) -> list[Stage]:
    """Returns the parameters, in fp32; a block's are listed once and count `n_layer` times, but
    where blocks differ."""
    if isinstance(config, ForeignConfig):
        return _weights_by_shape(config)
    prefix, sides = f"{config.network.parameters.prefix}.", lengths(config)
    rows = [
        Stage(
            name.removeprefix(prefix),
            " ".join(parameter.dims),
            _shape(parameter.dims, sides),
            4,
            config.n_layer if "*" in name else 1,
        )
        for name, parameter in parameters(config, layers="*").items()
    ]
    assert sum(stage.times * math.prod(stage.shape) for stage in rows) == config.num_parameters
    return rows


def _weights_by_shape(config: ForeignConfig) -> list[Stage]:
    """Returns the parameters, of which those of layers that have the same name and shape are one."""
    times: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in config.parameter_shapes.items():
        key = _NUMBER.sub(".*.", name, count=1), shape
        times[key] = times.get(key, 0) + 1
    rows: list[Stage] = []
    for (name, shape), count in times.items():
        rows.append(Stage(name, " ".join(map(str, shape)), shape, 4, count))
    return rows


def parameters(
    config: GPTConfig, *, layers: Iterable[object] | None = None
) -> dict[str, Parameter]:
    """Returns the parameters by name, in the order of `GPT.named_parameters`: of these layers, or
    of all. A tied head has none."""
    names = config.network.parameters
    named = dict(names.before)
    for layer in range(config.n_layer) if layers is None else layers:
        named |= {
            f"{names.blocks}.{layer}.{name}": parameter for name, parameter in names.block.items()
        }
    named |= names.after
    head = {} if config.tie_word_embeddings else {"lm_head.weight": HEAD}
    return {f"{names.prefix}.{name}": parameter for name, parameter in named.items()} | head


def parameter_shapes(config: Shape) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its name, in the order of the model's
    `named_parameters`; a tied head has none."""
    if isinstance(config, ForeignConfig):
        return config.parameter_shapes
    sides = lengths(config)
    return {name: _shape(parameter.dims, sides) for name, parameter in parameters(config).items()}


def hidden_matrices(config: Shape) -> dict[str, HiddenMatrix]:
    """Returns the parameters of the blocks that have two sides, by name, in the order of the
    model's `named_parameters`."""
    if isinstance(config, ForeignConfig):
        return hidden_matrices_by_name(config.parameter_shapes)
    names = config.network.parameters
    sides = lengths(config)
    of_block: dict[str, HiddenMatrix] = {}
    for name, parameter in names.block.items():
        if len(parameter.dims) == 2:
            rows, columns = _shape(parameter.dims, sides)
            matrix = HiddenMatrix((rows, columns), 0, (rows,))
            if parameter.fused:
                pieces = _shape(parameter.fused.dims, sides)
                matrix = HiddenMatrix((rows, columns), parameter.fused.axis, pieces)
            of_block[name] = matrix
    matrices: dict[str, HiddenMatrix] = {}
    for layer in range(config.n_layer):
        for name, matrix in of_block.items():
            matrices[f"{names.prefix}.{names.blocks}.{layer}.{name}"] = matrix
    return matrices


def _shape(dims: Iterable[str], sides: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sides[dim] for dim in dims)
