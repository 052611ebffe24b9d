"""Answers who holds what of the training state: which ranks divide it, and what each of them keeps,
sums and sends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raymill.state.division import seats_of
from raymill.state.shard import NOTHING, Divided


@dataclass(frozen=True)
class Sharding:
    """How the ranks of an attempt divide the training state among them, as one of them sees it.

    `num_holders` ranks, which follow each other, hold one copy of the state together. A rank alone
    holds one where nothing is divided.

        rank        0   1   2   3   4   5
        copy        0   0   0   1   1   1       with three holders
        place       0   1   2   0   1   2       and so, which part of each bucket
    """

    divided: Divided = NOTHING
    rank: int = 0
    world_size: int = 1
    num_holders: int = 1
    seats: tuple[int, ...] = ()
    """The groups in the order in which they halve sums (`division`): by default, of their
    numbers."""

    @classmethod
    def of(
        cls,
        divided: Divided,
        *,
        num_holders: int,
        rank: int,
        world_size: int,
        nodes: Sequence[object] = (),
    ) -> "Sharding":
        """Divides the state among so many holders, which divide the world size. `nodes` has the node
        of each rank, if it is known."""
        if not divided.vectors or num_holders == 1:
            num_holders, divided = 1, NOTHING
        sharding = cls(divided, rank, world_size, num_holders)
        if not nodes:
            return sharding
        nodes_of_groups = nodes[:: sharding.group_size]
        return replace(sharding, seats=tuple(seats_of(nodes_of_groups)))

    def is_divided(self, name: str) -> bool:
        """Reports whether each rank holds only its own parts of "values", "gradient" or one of the
        update rule's vectors. The lengths do not tell: all blocks of a very small model may be one
        rank's."""
        match name:
            case "values":
                return self.divided.values
            case "gradient":
                return self.divided.gradient
        return self.divided.vectors

    @property
    def is_whole(self) -> bool:
        """Whether each rank holds a copy of its own."""
        return self.num_holders == 1

    # Copies of the state.

    @property
    def copy(self) -> int:
        """Index of the copy this rank holds (or holds a part of)."""
        return self.rank // self.num_holders

    @property
    def num_copies(self) -> int:
        return self.world_size // self.num_holders

    @property
    def place(self) -> int:
        """This rank's place among the holders of its copy: it owns the parts of this number."""
        return self.rank % self.num_holders

    @property
    def holders(self) -> list[int]:
        """The ranks that hold this rank's copy together."""
        first = self.copy * self.num_holders
        return [*range(first, first + self.num_holders)]

    @property
    def is_sole_copy(self) -> bool:
        """Whether a lost rank takes the newest form of its parts with it."""
        return not self.is_whole and self.num_copies == 1

    @property
    def writes(self) -> bool:
        """Whether this rank stores what it holds in checkpoints: the other copies are the same."""
        return self.copy == 0

    # Sums of the gradient: by R groups of g ranks, each of which sums one gradient together.

    @property
    def group_size(self) -> int:
        """The number of ranks g of a group, which follow each other: 1 where each rank sums whole
        gradients."""
        return self.num_holders if self.divided.gradient else 1

    @property
    def num_groups(self) -> int:
        return self.world_size // self.group_size

    @property
    def group(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.group_size

    @property
    def member(self) -> int:
        """This rank's place in its group."""
        return self.rank % self.group_size

    @property
    def seated_groups(self) -> Sequence[int]:
        return self.seats or range(self.num_groups)

    @property
    def counterparts(self) -> list[int]:
        """The ranks with this rank's place in each group, which exchange sums, in the order of
        their groups' seats."""
        return [group * self.group_size + self.member for group in self.seated_groups]

    # Messages of a step.

    @property
    def sends_sums(self) -> bool:
        """Whether counterparts send one another the whole sum of each part; else only the part's
        owner needs it."""
        return self.is_whole or self.divided.gradient

    @property
    def owners(self) -> Sequence[int] | None:
        """The number of the part of each bucket that each counterpart owns; None where any part may
        be anyone's."""
        return None if self.sends_sums else self.counterparts

    @property
    def seated_holders(self) -> Sequence[int]:
        """The holders of this rank's copy, in the order in which they gather updated weights."""
        return self.holders if self.divided.gradient else self.counterparts

    @property
    def sends_values(self) -> bool:
        """Whether an update ends with the other holders' parts of the weights."""
        return not (self.is_whole or self.divided.values)
