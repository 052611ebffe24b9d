"""Refuses models that cannot be computed in the way that is set."""

from cluster.settings.train import TrainConfig
from model.config import Shape
from model.numerics import FP32


def require_computed(shape: Shape, train: TrainConfig) -> None:
    """Raises `ValueError` where the model cannot be computed as set."""
    if train.lora_rank is not None and train.compute not in ("auto", "plain"):
        raise ValueError(
            f"train.compute={train.compute} is for whole models, and train.lora_rank asks for an adapter, whose layers "
            "are PEFT's; leave it out, or set plain"
        )
    if train.compute == "portable":
        _require_portable(shape, train)
    if not shape.by_transformers:
        return
    if train.compute in ("cpu", "portable"):
        raise ValueError(
            f"train.compute={train.compute} is for our own shapes, and this model is transformers'; leave it out, or "
            "set plain or compiled"
        )
    if train.compute == "compiled" and shape.num_experts:
        raise ValueError(
            f"train.compute=compiled: a model of type {shape.model_type!r} chooses the experts of each token by its "
            "values, which is no fixed graph; leave it out, or set plain"
        )


def _require_portable(shape: Shape, train: TrainConfig) -> None:
    if train.precision not in ("auto", FP32.name):
        raise ValueError(
            f"train.compute=portable computes in fp32, as processors round bf16 in several ways, and train.precision "
            f"is {train.precision}; leave it out"
        )
    if shape.dropout:
        raise ValueError(
            f"train.compute=portable has no dropout, and model.dropout is {shape.dropout}; set it to 0"
        )
    if not train.exact:
        raise ValueError("train.compute=portable is for exact sums; leave out train.exact=false")
