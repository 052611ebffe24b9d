"""Writes safetensors files, and hashes named tensors."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""By their name in safetensors."""

_PIECE_BYTES = 8 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parameter_hash(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256, in hex, over the parameters in the order of their names.

    Each adds `name \\0 dtype \\0 d0,d1,… \\0` in UTF-8 (dtype as torch prints it, without `torch.`)
    and then its elements, row-major and little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(hashed_name(name, tensor.dtype, tensor.shape))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashed_name(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Returns what a parameter adds to the parameter hash before its elements."""
    return f"{name}\0{str(dtype).removeprefix('torch.')}\0{','.join(map(str, shape))}\0".encode()


def safetensors_pieces(
    tensors: Mapping[str, Tensor], alignment: int = 8
) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file in version 0.8's layout: the header, then the widest types first,
    by name.

    Tensors on the CPU are written from where they are: they must not change meanwhile.
    """
    # Of each tensor that a mapping may read from a file, no more than this is kept
    kinds = {name: (tensor.dtype, [*tensor.shape]) for name, tensor in tensors.items()}
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % alignment)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        content = (
            tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]
