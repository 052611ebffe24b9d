"""Says who computes what in a step: the ranks are R groups of g members each, and a group has a few
subtrees.

Where nothing but the optimizer is sharded, g is 1: a rank takes the lanes of its subtrees in order.
Else the members of a group take its micro-batches in turns, one each, in order: the owner of a
shard then gets g neighboring pieces at once, and sums them along the same tree in few buffers. In
the last turn, a member that has none left computes the last micro-batch again: its result is not
used, but all send the same messages in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raymill.state.sharding import Sharding
from raymill.sums.exact_reduce import LaneStep, lane_steps, num_buffers, subtrees_of_ranks
from raymill.sums.teams import TeamPlan, team_plan


@dataclass(frozen=True)
class StepPlan:
    """A step of so many lanes, each of k micro-batches, as one rank sees it."""

    sharding: Sharding
    num_lanes: int
    num_micro_batches: int  # of a lane: k

    @cached_property
    def subtrees(self) -> Sequence[Sequence[range]]:
        """The subtrees of each group: neighbors in their seats have neighboring lanes."""
        by_seat = subtrees_of_ranks(self.num_lanes, self.sharding.num_groups)
        by_group = dict(zip(self.sharding.seated_groups, by_seat, strict=True))
        return [by_group[group] for group in range(self.sharding.num_groups)]

    @cached_property
    def steps(self) -> list[LaneStep]:
        """The steps of the sums: one for each lane, or with members that share one out, for each
        micro-batch."""
        return lane_steps(self.subtrees[self.sharding.group], num_pieces=self._num_pieces)

    @property
    def num_buffers(self) -> int:
        return num_buffers(self.subtrees[self.sharding.group], num_pieces=self._num_pieces)

    @cached_property
    def teams(self) -> TeamPlan:
        """Which groups finish the sum of all lanes together, by their seats."""
        by_seat = subtrees_of_ranks(self.num_lanes, self.sharding.num_groups)
        return team_plan([range(self.num_lanes)], by_seat)

    @cached_property
    def turns(self) -> list[list[int]]:
        """The numbers of the micro-batches that this rank computes in each of its turns."""
        return self.turns_of(self.sharding.rank)

    def turns_of(self, rank: int) -> list[list[int]]:
        """Returns the same of any rank."""
        size = self.sharding.group_size
        group, member = divmod(rank, size)
        numbers = self._numbers(group)
        if size == 1:
            k = self.num_micro_batches
            return [numbers[start : start + k] for start in range(0, len(numbers), k)]
        turns: list[list[int]] = []
        for start in range(0, len(numbers), size):
            place = min(start + member, len(numbers) - 1)
            turns.append([numbers[place]])
        return turns

    def steps_of_turn(self, turn: int) -> list[LaneStep]:
        """The steps of the pieces that the members have together; the first ones have one each."""
        size = self.sharding.group_size
        return self.steps[turn * size : (turn + 1) * size]

    @cached_property
    def counted(self) -> list[list[int]]:
        """The numbers of each rank's micro-batches, without what is computed again."""
        size = self.sharding.group_size
        counted: list[list[int]] = []
        for group in range(self.sharding.num_groups):
            numbers = self._numbers(group)
            counted += [numbers[member::size] for member in range(size)]
        return counted

    @property
    def _num_pieces(self) -> int:
        return self.num_micro_batches if self.sharding.group_size > 1 else 1

    def _numbers(self, group: int) -> list[int]:
        """Returns the numbers of a group's micro-batches, lane by lane."""
        k = self.num_micro_batches
        numbers: list[int] = []
        for subtree in self.subtrees[group]:
            numbers += range(subtree.start * k, subtree.stop * k)
        return numbers
