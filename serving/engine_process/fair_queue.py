"""Orders what a replica holds back, such as sequences from its engine: fairly between API keys, in
order of arrival within one. (Start-time fair queueing: Goyal, Vin and Cheng, 1996.)"""

from bisect import bisect, insort
from typing import Generic, NamedTuple, TypeVar

from serving.engine.messages import SequenceRequest

Item = TypeVar("Item")


class Held(NamedTuple, Generic[Item]):
    """An item and its turn. Turns are counted in costs: the cost of all that its key has asked for
    before it, or the most that any key had been given when it came, whichever is more."""

    turn: int
    number: int
    key: str
    cost: int
    item: Item


class FairLine(Generic[Item]):
    """A key that asks for much waits for itself: its next turn comes after all costs that it has
    asked for, and a key that was idle is next."""

    def __init__(self) -> None:
        self._held: list[Held[Item]] = []  # by turn, then by arrival
        self._turn = 0  # of the item that was taken last
        self._next: dict[str, int] = {}  # turn of a key's next item, if it is later than that

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, item: Item, *, key: str, number: int, cost: int) -> None:
        """Adds an item; numbers grow, so that no two are the same."""
        held = Held(self._next_turn(key), number, key, cost, item)
        insort(self._held, held)
        self._next[key] = held.turn + cost

    def charge(self, key: str, cost: int) -> None:
        """Moves a key's next turn back, for what an item has cost beyond what was expected, or
        forth where that is negative."""
        self._next[key] = max(self._turn, self._next.get(key, self._turn) + cost)

    def take(self) -> Item:
        """Removes and returns the next item of a line that has one."""
        self._turn = self._held[0].turn
        self._next = {key: turn for key, turn in self._next.items() if turn > self._turn}
        return self._held.pop(0).item

    def remove(self, number: int) -> bool:
        """Removes an item whose client has left, and moves up the later ones of its key. Returns
        False if it is not held any more."""
        gone = next((held for held in self._held if held.number == number), None)
        if gone is None:
            return False
        self._held.remove(gone)
        self._held = sorted(
            held._replace(turn=held.turn - gone.cost)
            if held.key == gone.key and held > gone
            else held
            for held in self._held
        )
        self._next[gone.key] -= gone.cost
        return True

    def behind(self, key: str) -> list[Item]:
        """Returns the items that a new one of this key would pass."""
        first = bisect(self._held, self._next_turn(key), key=lambda held: held.turn)
        return [held.item for held in self._held[first:]]

    def _next_turn(self, key: str) -> int:
        return max(self._turn, self._next.get(key, 0))


class FairQueue(FairLine[SequenceRequest]):
    """Sequences, whose costs are the tokens for which they take room in the cache."""

    def put(self, request: SequenceRequest, *, key: str) -> None:
        cost = len(request.prompt_ids) + request.max_tokens
        self.hold(request, key=key, number=request.seq_id, cost=cost)
