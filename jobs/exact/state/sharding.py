"""Says where a rank stands among those that divide the state."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """A rank's place among the R x g ranks; those of a group follow each other."""

    rank: int
    world_size: int
    group_size: int = 1  # g

    @property
    def member(self) -> int:
        return self.rank % self.group_size

    @property
    def number(self) -> int:
        """Of this rank's group."""
        return self.rank // self.group_size

    @property
    def num_groups(self) -> int:
        return self.world_size // self.group_size

    @property
    def members(self) -> list[int]:
        """The ranks of this rank's group."""
        first = self.number * self.group_size
        return [*range(first, first + self.group_size)]

    @property
    def counterparts(self) -> list[int]:
        """The ranks with this rank's place in each group."""
        return [*range(self.member, self.world_size, self.group_size)]
