"""The figures of a step, where a group has fewer lanes than members: some ranks then have no loss
of their own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from jobs.exact.audits.audit import NUM_CHECKSUMS, Shown, worst_block
from jobs.exact.audits.checksum import from_halves, halves_of
from raymill.state.bundle import bundles_of
from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.sharding import Sharding
from raymill.state.span import Span
from raymill.sums.exact_reduce import tree_sum
from raymill.sums.step_faults import OddGradient, Told
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import Measured, StepTotals, block_square_sums, norm_of
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.shardings import in_groups

CPU = torch.device("cpu")


@dataclass
class Table:
    """What every rank's `WorkerGroup.proven` returns, once all have called it."""

    world_size: int
    rows: list[Tensor] = field(default_factory=list)
    barrier: Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.barrier = (
            [torch.empty(0)] * self.world_size,
            Barrier(self.world_size, timeout=30),
        )

    def of(self, rank: int) -> WorkerGroup:
        table = self

        class Member:
            world_size = table.world_size

            def proven(self, own: Tensor, *, step: int, width: int) -> Tensor:
                table.rows[rank] = torch.cat([own, own.new_zeros(width - len(own))])
                table.barrier.wait()
                return torch.stack(table.rows)

        return cast(WorkerGroup, Member())


def losses_of(numbers: Sequence[int]) -> list[Tensor]:
    return [torch.tensor(1.0 / (number + 3)) for number in numbers]


@pytest.mark.parametrize(
    ("num_lanes", "world_size", "group_size"), [(11, 10, 2), (13, 12, 4), (16, 15, 5), (8, 4, 2)]
)
def test_ranks_without_a_loss_know_the_same_figures(
    num_lanes: int, world_size: int, group_size: int
) -> None:
    layout, table = FlatLayout.of({"transformer.h.0.w": (64, 3 * BLOCK)}), Table(world_size)
    gradient = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))

    def figures(rank: int) -> Any:
        sharding = in_groups(rank, world_size, group_size)
        plan = StepPlan(sharding, num_lanes, 1)
        totals = StepTotals(layout, sharding, table.of(rank), device=CPU)
        parts = [part.of(gradient) for part in own_parts(layout, sharding)]
        sums = [block_square_sums(part) for part in parts]
        losses = [torch.stack([loss, torch.tensor(5.0)]) for loss in losses_of(plan.counted[rank])]
        checksums = [torch.tensor(-(rank + 1) << 40 | number) for number in range(NUM_CHECKSUMS)]
        found = totals.finish(
            1,
            plan,
            block_sums=sums,
            losses=losses,
            shown=halves_of(checksums),
            told=Told.of(0.1 * rank, OddGradient(rank, "b", 2), ["a", "b"]),
        )
        return len(losses), *found

    with ThreadPoolExecutor(world_size) as ranks:
        found = [*ranks.map(figures, range(world_size))]
    assert any(count == 0 for count, *_ in found) == (world_size != 4)
    loss = tree_sum(
        range(num_lanes), lambda node: losses_of([node.start])[0] if len(node) == 1 else None
    )
    shown = [
        Shown(*[(-(rank + 1) << 40 | number) % 2**64 for number in range(NUM_CHECKSUMS)])
        for rank in range(world_size)
    ]
    norm = norm_of(block_square_sums(gradient))
    told = tuple(Told(0.1 * rank, 1, rank, 1, 2) for rank in range(world_size))
    expected = (float(loss), norm, 5 * num_lanes, shown, told)
    for _, *figures in found:
        measured = Measured(*figures)
        rows = [Shown(*from_halves(numbers)) for numbers in measured.shown]
        assert (*measured[:3], rows, measured.told) == expected


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({}, 1), ({2: float("nan")}, 2), ({3: float("inf"), 2: float("nan")}, 2)],
)
def test_the_block_that_looks_most_wrong_is_the_first_that_is_not_finite_or_the_largest(
    wrong: dict[int, float], expected: int
) -> None:
    layout = FlatLayout.of({"transformer.h.0.w": (4, BLOCK)})
    sharding = in_groups(0, 1, 1)
    totals = StepTotals(layout, sharding, WorkerGroup(0, 1), device=CPU)
    sums = torch.tensor([1.0, 5.0, 2.0, 3.0], dtype=torch.float64)
    for block, value in wrong.items():
        sums[block] = value
    loss = torch.tensor([0.5, 7.0])
    totals.finish(1, StepPlan(sharding, 1, 1), block_sums=[sums], losses=[loss])
    assert worst_block(totals.square_sums) == expected
    assert totals.losses() == [[0.5]]


def own_parts(layout: FlatLayout, sharding: Sharding) -> list[Span]:
    """Returns the places of the values whose sums a rank makes: of its member's part of each
    bucket, that of its group."""
    size, num_groups = sharding.group_size, sharding.num_groups
    owned = layout.parts(sharding.member, world_size=size)
    places: list[Span] = []
    for bundle in bundles_of(owned.homes, num_groups, parts=None):
        for part in bundle.parts(sharding.group):
            places += owned.cut(part)
    return places
