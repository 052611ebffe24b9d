"""Tells on a CPU which operations of a computation a GPU would refuse, under
`torch.use_deterministic_algorithms(True)`, as they have no deterministic form there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALERTS: dict[str, tuple[str, ...]] = {
    "AvgPool3d": ("avg_pool3d_backward",),
    "AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "MaxUnpool1d": ("max_unpool2d",),
    "MaxUnpool2d": ("max_unpool2d",),
    "MaxUnpool3d": ("max_unpool3d",),
    "interpolate": (
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "_upsample_bilinear2d_aa_backward",
        "upsample_bicubic2d_backward",
        "_upsample_bicubic2d_aa_backward",
        "upsample_trilinear3d_backward",
    ),
    "ReflectionPad1d": ("reflection_pad1d_backward",),
    "ReflectionPad2d": ("reflection_pad2d_backward",),
    "ReflectionPad3d": ("reflection_pad3d_backward",),
    "NLLLoss": ("nll_loss2d_forward",),
    "CTCLoss": ("_ctc_loss_backward",),
    "EmbeddingBag": ("_embedding_bag_dense_backward",),
    "put_": ("put", "put_"),
    "histc": ("histc",),
    "bincount": ("bincount",),
    "median": ("median", "nanmedian"),
    "grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "cumsum": ("cumsum", "cumsum_"),
    "scatter_reduce": ("scatter_reduce", "scatter_reduce_"),
    "resize_": (),  # of quantized tensors, which nothing here has
}
"""By the name in PyTorch's documentation: the operations of `torch.ops.aten`."""


def _floats(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("dtype") or args[0].dtype
    return bool(wanted.is_floating_point or wanted.is_complex)


_ONLY_IF: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any]], bool]] = {
    "cumsum": _floats,
    "bincount": lambda args, kwargs: len(args) > 1 or "weights" in kwargs,
    "median": lambda args, kwargs: len(args) > 1 or "dim" in kwargs,
    "scatter_reduce": lambda args, kwargs: "prod" in args,
}


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names: dict[object, str] = {}
        for name, operations in ALERTS.items():
            for operation in operations:
                self._names[getattr(torch.ops.aten, operation)] = name

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        name = self._names.get(func.overloadpacket)
        if name and _ONLY_IF.get(name, lambda *_: True)(args, named):
            self.found.add(name)
        return func(*args, **named)


@contextmanager
def cuda_alerts() -> Iterator[set[str]]:
    """Lasts while operations are watched, forward and backward. Those that a GPU would refuse come
    into the set, by the names in PyTorch's documentation."""
    with _Watch() as watch:
        yield watch.found
