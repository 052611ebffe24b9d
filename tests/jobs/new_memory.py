"""Sees the memory that tensors take, beside what is known, in the thread that enters it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NewMemory(TorchDispatchMode):
    """Sees the size of each tensor on the device that is no view of an earlier one."""

    def __init__(self, known: Iterable[Tensor], device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._known = list(known)  # alive, so that their storages' ids are theirs alone
        self._ids = {tensor.untyped_storage()._cdata for tensor in self._known}
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ids:
                    self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return made
