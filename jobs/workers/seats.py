"""Which workers of a group take part in a round of their meetings.

Each worker of a group has a seat. One whose node has died is vacant: the others meet without it, as
fewer ranks, until another worker takes it. A worker that comes to a new seat makes them one more.
"""

import json
from collections.abc import Collection, Iterable

import torch.distributed as dist


class Rounds:
    """The rounds of a group's meetings, in their store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def round(self) -> int:
        return int(self._store.get("round"))

    def end(self, number: int) -> None:
        """Ends a round, unless that was done already: the next one begins."""
        self._store.compare_set("round", str(number), str(number + 1))


class Seats(Rounds):
    """The seats of a group. Whose are in a round is settled once, by the first who asks or who begins
    it, and stays as it is."""

    def __init__(self, store: dist.Store, num_seats: int) -> None:
        """The first round is of seats 0 to `num_seats` - 1, as the group was started."""
        super().__init__(store)
        self._first = range(num_seats)

    def taken(self, number: int) -> set[int]:
        """Returns the seats of a round: the seats of the round before, where nobody has changed
        them."""
        if self._store.check([_key(number)]):
            return set(json.loads(self._store.get(_key(number))))
        return self._settled(number, self.taken(number - 1) if number else self._first)

    def vacate(self, seats: Collection[int]) -> None:
        """Ends the round if it has one of these, so that the next has none."""
        while (taken := self.taken(number := self.round())).intersection(seats):
            self._settled(number + 1, taken.difference(seats))
            self.end(number)

    def take(self, seat: int) -> None:
        """Ends the round if it goes without this seat, so that the next has it."""
        while seat not in (taken := self.taken(number := self.round())):
            self._settled(number + 1, taken | {seat})
            self.end(number)

    def _settled(self, number: int, seats: Iterable[int]) -> set[int]:
        found = self._store.compare_set(_key(number), "", json.dumps(sorted(seats)))
        return set(json.loads(found))


def _key(number: int) -> str:
    return f"{number}/seats"
