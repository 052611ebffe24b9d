"""How a run computes: with which operations, in which precision, and how rows come to the
device."""

from collections.abc import Iterator
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from cluster.settings.run import RunConfig, way_to_compute
from model.attention import Mask, document_mask, document_positions, packed_documents
from model.config import GPTConfig
from model.cpu_ops import operations as cpu_ops
from model.decoder import Decoder
from model.decoders.make import initial_weights
from model.kernels.update_rules import norm_of, square_sums
from model.linear_cross_entropy import IGNORE_INDEX
from model.operations import PLAIN, compiled, product_type, recomputed, use_operations
from raymill.state.gathered_weights import GatheredWeights
from raymill.sums.step_totals import FAST_NORM, BlockNorm


class MicroBatch(NamedTuple):
    """Rows that are computed together, on the device, as `Decoder.loss` takes them: B sequences of T
    tokens."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    positions: Tensor | None  # (B, T)
    mask: Mask


def choose_operations(
    model: Decoder,
    config: RunConfig,
    gathered: GatheredWeights | None = None,
) -> None:
    """Lets the model compute as the run's settings say, with weights that may have to be
    gathered."""
    way = way_to_compute(config)
    match way:
        case "plain":
            ops = PLAIN
        case "compiled":
            ops = compiled()
        case "cpu":
            ops = cpu_ops.CPU
        case "portable":
            from model.kernels.operations import PORTABLE  # noqa: PLC0415 (its kernels are compiled)

            ops = PORTABLE
        case _:
            assert_never(way)
    if config.train.recompute:
        ops = recomputed(ops)
    if gathered:
        ops = ops._replace(block=gathered.in_turn(ops.block))
    use_operations(model, ops)


def gradient_norm(config: RunConfig) -> BlockNorm:
    """Returns the way in which the run computes a gradient's norm."""
    if way_to_compute(config) != "portable":
        return FAST_NORM
    return BlockNorm(square_sums, norm_of)


def first_weights(config: RunConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights that a run begins with, one parameter after the other."""
    if way_to_compute(config) != "portable":
        return initial_weights(config.model, seed)
    from model.kernels.operations import portable_weights  # noqa: PLC0415 (as above)

    assert isinstance(config.model, GPTConfig), "see `require_computed`"
    return portable_weights(config.model, seed)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    numerics = config.train.numerics
    # Its cache would keep a rounded copy of each weight until the end of a pass, and round the
    # gradients of those that are used twice once more
    return torch.autocast(
        device.type,
        dtype=product_type(numerics),
        enabled=numerics.is_rounded,
        cache_enabled=not config.model.by_transformers,
    )


def micro_batch(
    rows: tuple[Tensor, Tensor],
    config: RunConfig,
    device: torch.device,
    *,
    eot_id: int | None,
    has_holes: bool = False,
) -> MicroBatch:
    """Returns inputs and targets (B, T) that were read, without waiting for the device.

    With `eot_id` the documents in a row see nothing of each other: FlashAttention, which has
    neither fp32 nor dropout here, gets their borders; other ways to attend get a mask.
    transformers' modules make their masks of the positions. With `has_holes` the rows are of text,
    where targets that do not count tell nothing of documents.
    """

    def moved(values: Tensor) -> Tensor:
        if device.type != "cuda":
            return values
        return values.pin_memory().to(device, non_blocking=True)

    inputs, targets = rows
    if eot_id is None:
        return MicroBatch(moved(inputs), moved(targets), None, None)
    positions = document_positions(inputs, None if has_holes else targets, eot_id=eot_id)
    if config.model.by_transformers:
        return MicroBatch(moved(inputs), moved(targets), moved(positions), None)
    if (
        device.type == "cuda"
        and config.train.numerics.has_flash_attention
        and not config.model.dropout
    ):
        documents = packed_documents(positions)
        mask = documents._replace(starts=moved(documents.starts))
        return MicroBatch(moved(inputs), moved(targets), moved(positions), mask)
    positions = moved(positions)
    return MicroBatch(moved(inputs), moved(targets), positions, document_mask(positions))


def num_counted(targets: Tensor) -> int:
    """Returns how many targets the loss counts: all tokens of a text, and the tokens of answers in
    conversations."""
    return int((targets != IGNORE_INDEX).sum())
