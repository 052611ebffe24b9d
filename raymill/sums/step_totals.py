"""Makes the figures of a step's whole batch, its loss and its gradient's norm, from what each rank
has of them.

Losses are summed along the lanes' tree, the norm in the order of the flat buffer's blocks of
values.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymill.state.bundle import bundles_of
from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.sharding import Sharding
from raymill.state.span import Span
from raymill.sums.exact_reduce import tree_sum
from raymill.sums.step_faults import NUM_TOLD, Told
from raymill.sums.step_plan import StepPlan
from raymill.workers.worker_group import WorkerGroup

_NOTHING = Told.of(0.0, None, [])


class Measured(NamedTuple):
    """The figures of a step's whole batch, equal on every rank."""

    loss: float  # nats per counted token
    norm: float  # of the gradient
    num_counted: int  # tokens that the loss counts
    shown: Sequence[Sequence[float]] = ()  # the numbers that ranks show one another, by rank
    told: Sequence[Told] = ()  # by rank


class BlockNorm(NamedTuple):
    """A way to compute a gradient's norm."""

    of_blocks: Callable[[Tensor], Tensor]  # as `block_square_sums`
    whole: Callable[[Tensor], float]  # as `norm_of`


class StepTotals:
    """Gathers what all ranks have, and with it the proof that every message of the step has
    arrived."""

    def __init__(
        self,
        layout: FlatLayout,
        sharding: Sharding,
        group: WorkerGroup,
        *,
        device: torch.device,
        norm: Callable[[Tensor], float] | None = None,
    ) -> None:
        self._group = group
        self._norm = norm or norm_of
        blocks_of_ranks = _blocks_of_ranks(layout, sharding)
        self._num_blocks = max(map(len, blocks_of_ranks))
        # The rank (N,) that sums each block of the flat buffer, and the block's place (N,) among
        # that rank's own.
        owners = torch.empty(layout.size // BLOCK, dtype=torch.int64)
        places = torch.empty_like(owners)
        for rank, blocks in enumerate(blocks_of_ranks):
            owners[blocks] = rank
            places[blocks] = torch.arange(len(blocks))
        self._block_order = (owners.to(device), places.to(device))
        self._figures = torch.empty(0)
        self.square_sums = torch.empty(0)  # of the last gradient's blocks, on all ranks

    def finish(
        self,
        step: int,
        plan: StepPlan,
        *,
        block_sums: Sequence[Tensor],
        losses: Sequence[Tensor],
        shown: Tensor | None = None,
        told: Told = _NOTHING,
    ) -> Measured:
        """Returns the sum of the losses, from those of this rank's counted micro-batches in order,
        each with the number of tokens that it counts (2,), the gradient's norm, from the sums of
        squares of this rank's parts, and what each rank tells all others. Where each rank shows
        numbers (n,), equally many, it also returns those of all. Raises `LostPeerError` where a
        message of the step did not arrive."""
        sums = torch.cat(list(block_sums))
        padding = sums.new_zeros(self._num_blocks - len(sums))
        losses_and_counts = [loss.double() for loss in losses]
        own = sums.new_zeros(0) if shown is None else shown.double()
        row = torch.cat([sums, padding, own, sums.new_tensor(told), *losses_and_counts])
        table = row[None]
        end_of_shown = self._num_blocks + len(own)
        if self._group.world_size > 1:
            width = end_of_shown + NUM_TOLD + 2 * max(map(len, plan.counted))
            table = self._group.proven(row, step=step, width=width)
        rest = table[:, end_of_shown:].cpu()
        figures = rest[:, NUM_TOLD:].unflatten(1, (-1, 2))  # (W, most counted, 2)
        self._figures, self.square_sums = figures, table[self._block_order]
        return Measured(
            loss=_sum_of_losses(plan, figures[..., 0].float()),
            norm=self._norm(self.square_sums),
            num_counted=int(figures[..., 1].sum()),
            shown=table[:, self._num_blocks : end_of_shown].tolist() if len(own) else (),
            told=tuple(Told(*numbers) for numbers in rest[:, :NUM_TOLD].tolist()),
        )

    def losses(self) -> list[list[float]]:
        """Returns the losses of the last batch, before they are scaled: by rank, in the order of
        its counted micro-batches, with zeros where others have more."""
        losses: list[list[float]] = self._figures[..., 0].tolist()
        return losses


def _sum_of_losses(plan: StepPlan, losses: Tensor) -> float:
    """Returns the sum along the tree over lanes, from each rank's losses (W, most counted)."""
    by_number: dict[int, Tensor] = {}
    for row, numbers in zip(losses, plan.counted, strict=True):
        by_number |= dict(zip(numbers, row, strict=False))
    k = plan.num_micro_batches

    def loss_of_lane(node: range) -> Tensor | None:
        if len(node) > 1:
            return None
        numbers = range(node.start * k, node.stop * k)
        return reduce(torch.add, [by_number[number] for number in numbers])

    return float(tree_sum(range(plan.num_lanes), loss_of_lane))


def _blocks_of_ranks(layout: FlatLayout, sharding: Sharding) -> list[Tensor]:
    """Returns the numbers of the blocks whose sums each rank makes, in its order: of its member's
    parts of the buckets, the parts of its group."""
    blocks_of_ranks = [torch.empty(0)] * sharding.world_size
    for member in range(sharding.group_size):
        owned, buckets = layout.whole, layout.buckets
        if sharding.group_size > 1:
            owned = layout.parts(member, world_size=sharding.group_size)
            buckets = owned.homes
        blocks = _blocks_at(owned.spans)
        parts = layout.parts_of_owners(sharding.owners) if sharding.owners else None
        bundles = bundles_of(buckets, sharding.num_groups, parts=parts)
        for seat, group in enumerate(sharding.seated_groups):
            own_blocks: list[Tensor] = []
            for bundle in bundles:
                for part in bundle.parts(seat):
                    own_blocks.append(blocks[part.start // BLOCK : part.stop // BLOCK])
            rank = group * sharding.group_size + member
            blocks_of_ranks[rank] = torch.cat(own_blocks)
    return blocks_of_ranks


def _blocks_at(spans: Sequence[Span]) -> Tensor:
    """Returns the numbers of the blocks at some places of the layout."""
    return torch.cat([torch.arange(span.start // BLOCK, span.stop // BLOCK) for span in spans])


def block_square_sums(values: Tensor) -> Tensor:
    """Returns sums of squares (P / BLOCK,), in float64, of values (P,) that begin at a block; the
    last may be short.

    A block has the same bits whichever blocks are computed with it: CUDA's kernel gives each of
    fewer than 16 rows more threads (ATen/native/cuda/Reduce.cuh). Within a block fp32 suffices, in
    half the time of float64.
    """
    end = len(values) - len(values) % BLOCK
    whole_blocks = values[:end].view(-1, BLOCK)
    short_block = values[end:].view(1, -1)
    sums = [values.new_zeros(0, dtype=torch.float64)]
    for blocks in (whole_blocks, short_block):
        if blocks.numel():
            num_missing = max(0, 16 - len(blocks))
            rows = F.pad(blocks, (0, 0, 0, num_missing)) if blocks.is_cuda else blocks
            norms = torch.linalg.vector_norm(rows, dim=1)[: len(blocks)]
            sums.append(norms.double().square_())
    return torch.cat(sums)


def norm_of(block_sums: Tensor) -> float:
    """Returns the Euclidean norm from the sums of all blocks, in order."""
    return float(block_sums.sum().sqrt())


FAST_NORM = BlockNorm(block_square_sums, norm_of)
