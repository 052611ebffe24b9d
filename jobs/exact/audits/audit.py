"""Says what is computed a second time, by whom and in which steps: a lane's gradient has the same
bits wherever it is computed, so a second opinion needs no tolerance.

In an audited step each rank computes one more turn, another rank's, on another node where there is
one. The turn is drawn anew each time. Both make a checksum of its gradient, and all ranks see all
of them. An audited step also compares the copies of the state, and has all ranks make the additions
of a few blocks of the gradient again (`excerpt`).

A step whose figures cannot be trusted is taken again as an audit of everything: each rank computes
all turns of another one.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.sharding import Sharding
from raymill.state.span import Span
from raymill.sums.step_plan import StepPlan

if TYPE_CHECKING:  # a plan of a run needs no PyTorch
    from torch import Tensor

COST = 0.01
"""The share of a step's time that audits may take by default."""

_TURNS_OF_AUDIT = 2.4
"""What an audit costs at most: one turn more, and the checksums of two gradients and of the state
and sums that are added again, which take longer than a turn for the smallest models alone
(`bench_sentinel`)."""

_EXCERPT_BLOCKS = 64  # whose additions are made again: 256 KiB of each lane's gradient, at most
_MOST_EXCERPTED = 1 << 20  # values of all lanes together, 4 MiB, which go to all ranks
_MOST_OF_MATRIX = 1 << 22  # values; five times as many, 80 MiB, go to all ranks

NUM_CHECKSUMS = 4
"""What each rank shows in an audited step, see `Shown`."""


@dataclass(frozen=True)
class Shown:
    """The checksums that one rank shows in an audited step."""

    own_turn: int  # of its turn that another rank computes too, or of all its turns
    other_turn: int  # of the other rank's turn that it computes, or of all of them
    values: int  # of the weights that it holds, before the update
    vectors: int  # of all that the update rule keeps, as far as it holds that


@dataclass(frozen=True)
class Audit:
    """Who computes what a second time in one step."""

    turns: Sequence[int]  # by rank: which of its turns is checked
    subjects: Sequence[int]  # by rank: whose turn it computes
    checks_all: bool = False  # all turns of each rank, and not one of them
    around: int | None = None  # the block in the middle of the excerpt; None where it is drawn

    def checked_turns(self, rank: int, plan: StepPlan) -> Sequence[int]:
        """Returns the numbers of a rank's turns that are checked."""
        return range(len(plan.turns_of(rank))) if self.checks_all else [self.turns[rank]]


@dataclass(frozen=True)
class Audits:
    """The audits of an attempt; a seed and a step decide them, the same on all ranks."""

    every_steps: int  # 0: none
    seed: int
    shifts: Sequence[int]
    """By how many a rank's number and its subject's may differ: so that as few as possible share
    a node."""
    also: Collection[int] = ()  # steps that are audited too

    @classmethod
    def of(
        cls,
        every_steps: int | None,
        plan: StepPlan,
        nodes: Sequence[object],
        *,
        seed: int,
        also: Collection[int] = (),
    ) -> "Audits":
        """`plan` is that of a full batch, and `nodes` has each rank's node. Without `every_steps`
        it is the least that costs `COST` at most."""
        if every_steps is None:
            every_steps = steps_between(plan)
        return cls(every_steps, seed, _shifts(nodes), also)

    def of_step(self, step: int, plan: StepPlan) -> Audit | None:
        """Returns None where the step is not audited."""
        if not self.every_steps or (step % self.every_steps and step not in self.also):
            return None
        turns: list[int] = []
        for rank in range(plan.sharding.world_size):
            turns.append(self._draw(step, f"turn of {rank}") % len(plan.turns_of(rank)))
        return Audit(turns, self._subjects(step, plan))

    def of_all_turns(self, step: int, plan: StepPlan, *, around: int) -> Audit:
        """Returns the audit of all that is computed in a step, of whose gradient the block `around`
        looks wrong."""
        turns = [0] * plan.sharding.world_size
        return Audit(turns, self._subjects(step, plan), checks_all=True, around=around)

    def _subjects(self, step: int, plan: StepPlan) -> list[int]:
        world_size = plan.sharding.world_size
        shift = self.shifts[self._draw(step, "shift") % len(self.shifts)]
        return [(rank + shift) % world_size for rank in range(world_size)]

    def excerpt(
        self, step: int, plan: StepPlan, *, num_blocks: int, around: int | None = None
    ) -> Span:
        """Returns the blocks of the gradient, of so many, whose additions are made again in an
        audited step."""
        most_blocks = max(1, _MOST_EXCERPTED // (plan.num_lanes * BLOCK))
        count = min(num_blocks, most_blocks, _EXCERPT_BLOCKS)
        last_first = num_blocks - count
        first = self._draw(step, "excerpt") % (last_first + 1)
        if around is not None:
            first = min(max(0, around - count // 2), last_first)
        return Span(first * BLOCK, (first + count) * BLOCK)

    def matrix(self, step: int, layout: FlatLayout) -> str | None:
        """Returns the name of the matrix, of those that are updated as a whole, whose update is
        made again in an audited step; None where there is none, or each is too large."""
        names: list[str] = []
        for name, matrix in layout.matrices.items():
            if len(matrix.blocks) <= _MOST_OF_MATRIX:
                names.append(name)
        return names[self._draw(step, "matrix") % len(names)] if names else None

    def _draw(self, step: int, what: str) -> int:
        digest = hashlib.blake2b(f"audit:{self.seed}:{step}:{what}".encode(), digest_size=8)
        return int.from_bytes(digest.digest())


def steps_between(plan: StepPlan) -> int:
    """Returns the least number of steps between audits that costs `COST` at most."""
    ranks = range(plan.sharding.world_size)
    fewest_turns = min(len(plan.turns_of(rank)) for rank in ranks)
    return math.ceil(_TURNS_OF_AUDIT / (COST * fewest_turns))


def cost_of_audits(plan: StepPlan, every_steps: int) -> float:
    """Returns the share of the time that audits take at most at this interval."""
    return _TURNS_OF_AUDIT / (len(plan.turns) * every_steps)


def worst_block(square_sums: "Tensor") -> int:
    """Returns the number of the first block (N,) that is not finite, or else of the one with the
    largest values."""
    places = (~square_sums.isfinite()).nonzero()
    return int(places[0] if len(places) else square_sums.argmax())


def holders_of(sharding: Sharding, name: str) -> list[int]:
    """Returns for each rank a number that it shares with all that hold the same of "values" or of
    the rule's vectors."""
    if not sharding.is_divided(name):
        return [0] * sharding.world_size
    return [rank % sharding.num_holders for rank in range(sharding.world_size)]


def _shifts(nodes: Sequence[object]) -> list[int]:
    size = len(nodes)
    num_shared: dict[int, int] = {}
    for shift in range(1, size):
        pairs = zip(nodes, [*nodes[shift:], *nodes[:shift]], strict=True)
        num_shared[shift] = sum(node == other for node, other in pairs)
    fewest = min(num_shared.values(), default=0)
    # A rank alone can only compute its own turn again
    return [shift for shift, shared in num_shared.items() if shared == fewest] or [0]
