"""Makes the figures of a step's whole batch, its loss and its gradient's norm, from what each rank has of them.

Both have a fixed order: the losses that of the lanes' tree, the norm that of the flat buffer's blocks of values.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.exact.state.flat_layout import BLOCK, FlatLayout, part_of
from jobs.exact.state.sharding import Mesh
from jobs.exact.sums.exact_reduce import tree_sum
from jobs.exact.sums.step_plan import StepPlan
from jobs.workers.worker_group import WorkerGroup


class Measured(NamedTuple):
    """The figures of a step's whole batch, equal on every rank."""

    loss: float  # nats per counted token
    norm: float  # of the gradient
    num_counted: int  # tokens that the loss counts


class StepTotals:
    """Gathers what all ranks have, and with it the proof that every message of the step has arrived."""

    def __init__(self, layout: FlatLayout, mesh: Mesh, group: WorkerGroup, *, device: torch.device) -> None:
        self._group = group
        # The ranks in the order of their parts: the members' parts of a bucket, and the groups' parts of these.
        size, ranks = mesh.group_size, sorted(range(mesh.world_size), key=lambda rank: rank % mesh.group_size)
        members = [layout.parts(n, world_size=size) for n in range(size)]
        parts = [
            [part_of(place, rank // size, world_size=mesh.num_groups) for place in members[rank % size]]
            for rank in ranks
        ]
        self._num_blocks = max(sum(map(len, of_rank)) // BLOCK for of_rank in parts)
        self._block_order = _block_order(ranks, parts, device=device)

    def finish(self, step: int, plan: StepPlan, *, block_sums: Sequence[Tensor], losses: Sequence[Tensor]) -> Measured:
        """Returns the sum of the losses, from those of this rank's counted micro-batches in order, each with the number
        of tokens that it counts (2,), and the gradient's norm, from the sums of squares of this rank's parts. Raises
        `LostPeerError` where a message of the step did not arrive."""
        sums = torch.cat(list(block_sums))
        own = torch.cat([sums, sums.new_zeros(self._num_blocks - len(sums)), *(loss.double() for loss in losses)])
        table = own[None]
        if self._group.world_size > 1:
            table = self._group.proven(own, step=step, width=self._num_blocks + 2 * max(map(len, plan.counted)))
        figures = table[:, self._num_blocks :].unflatten(1, (-1, 2)).cpu()  # (W, most counted, 2)
        values = figures[..., 0].float()
        by_number = {n: row[place] for row, of in zip(values, plan.counted, strict=True) for place, n in enumerate(of)}
        k = plan.num_micro_batches

        def of_lane(node: range) -> Tensor | None:
            if len(node) > 1:
                return None
            return reduce(torch.add, [by_number[number] for number in range(node.start * k, node.stop * k)])

        total = float(tree_sum(range(plan.num_lanes), of_lane))
        return Measured(total, norm_of(table[self._block_order]), int(figures[..., 1].sum()))


def _block_order(
    ranks: Sequence[int], parts: Sequence[Sequence[range]], *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the rank (N,) that has each block of the flat buffer, and the block's place (N,) among that rank's own.
    `parts` has the parts of each of the ranks, one of each bucket. The order is that of every step, and takes seconds
    of Python for 512 ranks."""
    sizes = torch.tensor([[len(part) // BLOCK for part in of_rank] for of_rank in parts])  # (W, buckets)
    starts = sizes.cumsum(1) - sizes
    counts = sizes.T.flatten()  # bucket by bucket, rank by rank
    owners = torch.tensor(ranks).repeat(sizes.shape[1]).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first)) - first + starts.T.flatten().repeat_interleave(counts)
    return owners.to(device), places.to(device)


def block_square_sums(values: Tensor) -> Tensor:
    """Returns sums of squares (P / BLOCK,), in float64, of values (P,) that begin at a block; the last may be short.

    A block has the same bits whichever blocks are computed with it: CUDA's kernel gives each of fewer than 16 rows more
    threads (ATen/native/cuda/Reduce.cuh). Within a block fp32 suffices, in half the time of float64.
    """
    whole = len(values) - len(values) % BLOCK
    sums = [values.new_zeros(0, dtype=torch.float64)]
    for part in (values[:whole].view(-1, BLOCK), values[whole:].view(1, -1)):
        rows = F.pad(part, (0, 0, 0, max(0, 16 - len(part)))) if part.is_cuda else part
        if part.numel():
            sums.append(torch.linalg.vector_norm(rows, dim=1)[: len(part)].double().square_())
    return torch.cat(sums)


def norm_of(block_sums: Tensor) -> float:
    """Returns the Euclidean norm from the sums of all blocks, in order."""
    return float(block_sums.sum().sqrt())
