"""Computes the decoder's step with the CPU kernels of native/decoder.cpp: weights in the order in
which they are read, their own threads, and the same bits for a token whatever shares its step.

Shapes: N tokens of all readings, M rows, C model width, V vocabulary, W blocks of a reading.
"""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.gpt import GPT, Projection
from model.kernels.native_library import ACTIVATIONS, NoNativeLibraryError, load_library
from model.llama import Linear
from model.rotary import exact_frequencies
from serving.engine.runner import Reading, Survey

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
HEAD, TOKENS = 0, 1  # after the last layer

_REFUSAL_BYTES = 200

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int
_FUNCTIONS = {
    "raymill_create": [_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER, _NUMBER],
    "raymill_set_norm": [_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER],
    "raymill_set_matrix": [_POINTER, *[_NUMBER] * 4, _POINTER, _NUMBER, _NUMBER, _POINTER],
    "raymill_forward": [_POINTER, _POINTER],
    "raymill_logits": [_POINTER, _NUMBER, _POINTER, _POINTER],
    "raymill_survey": [_POINTER, _NUMBER, _POINTER, _POINTER, _POINTER],
    "raymill_exponentials": [_POINTER, _NUMBER, _POINTER],
    "raymill_log_probabilities": [_POINTER, _NUMBER, _POINTER, _POINTER],
    "raymill_is_portable": [_NUMBER],
    "raymill_destroy": [_POINTER],
}
"""The functions of native/decoder.cpp, with the types of their arguments."""


class Shape(ctypes.Structure):
    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int32)
            for name in ("layers", "width", "heads", "kv_heads", "ffn_width", "vocabulary")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("positions", "architecture", "activation", "num_blocks")
        ),
        ("epsilon", ctypes.c_float),
    ]


class Pass(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_tokens", ctypes.c_int),
        ("table_width", ctypes.c_int),
        *(
            (name, ctypes.c_void_p)
            for name in ("token_ids", "positions", "rows", "tables", "hidden")
        ),
    ]


class NativeRunner:
    """The `Runner` of the CPU kernels. Sums are fp32 for all types of weights, and have one order:
    a sequence has the same bits on every processor, unless bf16 is multiplied by instructions of
    its own.

    int8 quantizes each column of a weight and each row of inputs in 255 steps of its own size
    ("vector-wise quantization", Dettmers et al., 2022); keys and values are bf16.
    """

    def __init__(self, model: GPT, *, dtype: str, num_blocks: int, threads: int) -> None:
        """Raises `NoNativeLibraryError` if the kernels are not available or do not compute this
        model, and `MemoryError` without the memory for weights and cache."""
        self._library = load_library()
        _refuse_unread_parameters(model)
        for name, arguments in _FUNCTIONS.items():
            getattr(self._library, name).argtypes = arguments
        self._library.raymill_create.restype = ctypes.c_void_p
        self._library.raymill_set_matrix.restype = ctypes.c_bool
        self._library.raymill_is_portable.restype = ctypes.c_bool
        self.is_portable: bool = self._library.raymill_is_portable(KINDS[dtype])
        self._config = config = model.config
        network = config.network
        shape = Shape(
            layers=config.n_layer,
            width=config.n_embd,
            heads=config.n_head,
            kv_heads=config.num_kv_heads,
            ffn_width=config.ffn_width,
            vocabulary=config.vocab_size,
            positions=config.n_positions,
            architecture=network.kernels.number,
            activation=ACTIVATIONS[config.activation_function],
            num_blocks=num_blocks,
            epsilon=config.layer_norm_epsilon,
        )
        embedding = model.body.position_embedding
        positions = _as_float(exact_frequencies(config) if embedding is None else embedding.weight)
        refusal = ctypes.create_string_buffer(_REFUSAL_BYTES)
        self._decoder = ctypes.c_void_p(
            self._library.raymill_create(
                ctypes.byref(shape),
                KINDS[dtype],
                threads,
                positions.data_ptr(),
                refusal,
                _REFUSAL_BYTES,
            )
        )
        if refusal.value:
            raise NoNativeLibraryError(
                f"the kernels cannot compute {config.architecture}: {refusal.value.decode()}"
            )
        if self._decoder.value is None:
            raise MemoryError("the KV cache")
        for layer, block in enumerate(model.blocks):
            for which, name in enumerate(network.parameters.norms):
                self._set_norm(layer, which, block.get_submodule(name))
            for which, names in enumerate(network.kernels.matrices):
                self._set_matrix(
                    layer, which, *_side_by_side([block.get_submodule(name) for name in names])
                )
        self._set_norm(config.n_layer, 0, model.last_norm)
        self._set_matrix(config.n_layer, HEAD, model.head_weight.T)
        if not config.tie_word_embeddings:
            self._set_matrix(config.n_layer, TOKENS, model.token_embedding.weight.T)

    def __del__(self) -> None:
        if hasattr(self, "_decoder") and self._decoder.value is not None:
            self._library.raymill_destroy(self._decoder)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        width = max(len(reading.blocks) for reading in readings)
        token_ids, positions, rows = list[int](), list[int](), list[int]()  # (N,) each
        tables: list[list[int]] = []  # (readings, W)
        for row, reading in enumerate(readings):
            token_ids += reading.token_ids
            positions += reading.positions
            rows += [row] * len(reading.token_ids)
            tables.append(reading.blocks + [0] * (width - len(reading.blocks)))
        hidden = torch.empty(len(token_ids), self._config.n_embd)
        arrays = [
            _as_int32(token_ids),
            _as_int32(positions),
            _as_int32(rows),
            _as_int32(tables),
            hidden,
        ]
        work = Pass(len(token_ids), width, *[array.data_ptr() for array in arrays])
        self._library.raymill_forward(self._decoder, ctypes.byref(work))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._config.vocab_size)
        self._library.raymill_logits(
            self._decoder, len(hidden), hidden.data_ptr(), logits.data_ptr()
        )
        return logits

    def survey(self, logits: Tensor) -> Survey:
        logits = logits.contiguous()
        best = torch.empty(len(logits), dtype=torch.int64)
        finite = torch.empty(len(logits), dtype=torch.bool)
        outputs = (logits.data_ptr(), best.data_ptr(), finite.data_ptr())
        self._library.raymill_survey(self._decoder, len(logits), *outputs)
        return Survey(best, finite)

    def exponentials(self, numbers: Tensor) -> Tensor:
        numbers = numbers.contiguous()
        self._library.raymill_exponentials(self._decoder, len(numbers), numbers.data_ptr())
        return numbers

    def log_probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        found = torch.empty_like(logits)
        self._library.raymill_log_probabilities(
            self._decoder, len(logits), logits.data_ptr(), found.data_ptr()
        )
        return found

    def _set_norm(self, layer: int, which: int, norm: nn.Module) -> None:
        # RMSNorm has no bias
        weight, bias, *_ = [*map(_as_float, norm.parameters()), torch.zeros(self._config.n_embd)]
        self._library.raymill_set_norm(
            self._decoder, layer, which, weight.data_ptr(), bias.data_ptr()
        )

    def _set_matrix(
        self, layer: int, which: int, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """Passes weight (in, out) to the kernels."""
        weight = weight.detach().float()
        bias = None if bias is None else _as_float(bias)
        data = (weight.data_ptr(), *weight.stride(), None if bias is None else bias.data_ptr())
        if not self._library.raymill_set_matrix(self._decoder, layer, which, *weight.shape, *data):
            raise MemoryError("the weights")


def _refuse_unread_parameters(model: GPT) -> None:
    """Raises `NoNativeLibraryError`, which names the first parameter that the kernels would not be
    given: without it they would compute another model."""
    network = model.config.network
    modules: list[nn.Module | None] = [
        model.body.token_embedding,
        model.body.position_embedding,
        model.last_norm,
    ]
    if not model.config.tie_word_embeddings:
        modules.append(model.lm_head)
    for block in model.blocks:
        for name in (*network.parameters.norms, *chain.from_iterable(network.kernels.matrices)):
            modules.append(block.get_submodule(name))
    read: set[Tensor] = set()
    for module in modules:
        named = dict(module.named_parameters()) if module else {}
        read |= {named[name] for name in ("weight", "bias") if name in named}
    for name, parameter in model.named_parameters():
        if parameter not in read:
            raise NoNativeLibraryError(
                f"the kernels cannot compute {model.config.architecture}: they do not read {name}"
            )


def _side_by_side(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Returns the weights (in, out) of projections of the same inputs as one matrix, and their
    biases as one: zeros for a projection without, where another has one."""
    weights = [_weight(projection) for projection in projections]
    biases = [dict(projection.named_parameters()).get("bias") for projection in projections]
    matrix = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
    if all(bias is None for bias in biases):
        return matrix, None
    whole = torch.zeros(matrix.shape[1])
    parts = whole.split([weight.shape[1] for weight in weights])
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            part.copy_(bias.detach())
    return matrix, whole


def _weight(projection: nn.Module) -> Tensor:
    """Returns the weight (in, out). Only of known classes it is known which side is which: the
    sizes do not tell where they are equal."""
    match projection:
        case Projection():
            return projection.weight
        case Linear() | nn.Linear():
            return projection.weight.T
        case _:
            raise NoNativeLibraryError(
                f"the kernels do not know how {type(projection).__name__} stores its weight"
            )


def _as_float(values: Tensor) -> Tensor:
    return values.detach().float().contiguous()


def _as_int32(values: Sequence[int] | Sequence[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
