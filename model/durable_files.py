"""Files hashed as they are written, so that a manifest vouches for what was meant, not for what a disk kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.failpoints import failpoint

_PIECE_BYTES = 8 << 20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes and syncs the file, and returns its size and SHA-256 as a manifest lists them. Raises `OSError`.

    The pieces are large, so a thread that writes leaves the interpreter to the others nearly all the time.
    """
    failpoint("before_file")
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            file.flush()
            failpoint("mid_file")
        failpoint("before_fsync")
        os.fsync(file.fileno())
    failpoint("after_file")
    return {"size": size, "sha256": digest.hexdigest()}


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file in version 0.8's layout: the header, then the widest types first, by name.

    Tensors on the CPU are written from where they are: they must not change meanwhile.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold a NaN or an infinity."""

    def is_finite(tensor: Tensor) -> bool:
        # By numpy, as torch would use threads of its own beside the training's.
        parts = tensor.detach().cpu().float().reshape(-1).split(1 << 20)
        return all(np.isfinite(part.numpy()).all() for part in parts)

    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]


def sync(path: Path) -> None:
    """Flushes a file's or a folder's content to disk, which a crash of the machine may lose before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(source: Path, folder: Path) -> None:
    """Renames a complete folder. An existing one is replaced by two renames, and is absent between them."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    failpoint("before_rename")
    source.rename(folder)
    failpoint("after_rename")
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
