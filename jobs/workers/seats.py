"""Which workers of a group take part in a round of their meetings.

Ray Train starts a group with as many seats as it has workers. A seat whose node has died is vacant:
the others meet without it, as fewer ranks, until another worker takes it.
"""

import json
from collections.abc import Collection

import torch.distributed as dist


class Seats:
    """The seats of a group, in the store of its meetings. Who is in a round is settled once, by the
    first who asks or who begins it, and stays as it is."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def round(self) -> int:
        return int(self._store.get("round"))

    def end(self, number: int) -> None:
        """Ends a round, unless that was done already: the next one begins."""
        self._store.compare_set("round", str(number), str(number + 1))

    def vacant(self, number: int) -> set[int]:
        """Returns the vacant seats of a round: those of the one before, where nobody has changed
        them."""
        if number == 0:
            return set()
        if self._store.check([_key(number)]):
            return set(json.loads(self._store.get(_key(number))))
        return self._settled(number, self.vacant(number - 1))

    def vacate(self, seats: Collection[int]) -> None:
        """Ends the round if it waits for one of these, so that the next does not."""
        while not self.vacant(number := self.round()).issuperset(seats):
            self._settled(number + 1, self.vacant(number).union(seats))
            self.end(number)

    def take(self, seat: int) -> None:
        """Ends the round if it goes without this seat, so that the next has it."""
        while seat in (vacant := self.vacant(number := self.round())):
            self._settled(number + 1, vacant - {seat})
            self.end(number)

    def _settled(self, number: int, vacant: set[int]) -> set[int]:
        found = self._store.compare_set(_key(number), "", json.dumps(sorted(vacant)))
        return set(json.loads(found))


def _key(number: int) -> str:
    return f"{number}/vacant"
