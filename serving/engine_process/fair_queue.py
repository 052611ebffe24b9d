"""Orders the sequences that a replica holds back from its engine: fairly between API keys, in order
of arrival within one. (Start-time fair queueing: Goyal, Vin and Cheng, 1996.)"""

from bisect import bisect, insort
from typing import NamedTuple

from serving.engine.messages import SequenceRequest


class Held(NamedTuple):
    """A sequence and its turn. Turns are counted in tokens: those that its key has asked for before
    it, or those that the busiest keys had been given when it came, whichever are more."""

    turn: int
    seq_id: int
    key: str
    request: SequenceRequest

    @property
    def cost(self) -> int:
        """The tokens for which it takes room in the cache."""
        return len(self.request.prompt_ids) + self.request.max_tokens


class FairQueue:
    """A key that asks for much waits for itself: its next turn comes after all tokens that it has
    asked for, and a key that was idle is next."""

    def __init__(self) -> None:
        self._held: list[Held] = []  # by turn, then by arrival
        self._turn = 0  # of the sequence that was taken last
        self._next: dict[str, int] = {}  # turn of a key's next sequence, if it is later than that

    def __len__(self) -> int:
        return len(self._held)

    def put(self, request: SequenceRequest, *, key: str) -> None:
        held = Held(self._next_turn(key), request.seq_id, key, request)
        insort(self._held, held)
        self._next[key] = held.turn + held.cost

    def take(self) -> SequenceRequest:
        """Removes and returns the next sequence of a queue that has one."""
        self._turn = self._held[0].turn
        self._next = {key: turn for key, turn in self._next.items() if turn > self._turn}
        return self._held.pop(0).request

    def remove(self, seq_id: int) -> bool:
        """Removes a sequence whose client has left, and moves up the later ones of its key. Returns
        False if it is not held any more."""
        gone = next((held for held in self._held if held.seq_id == seq_id), None)
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

    def behind(self, key: str) -> list[SequenceRequest]:
        """Returns the sequences that a new one of this key would pass."""
        first = bisect(self._held, self._next_turn(key), key=lambda held: held.turn)
        return [held.request for held in self._held[first:]]

    def _next_turn(self, key: str) -> int:
        return max(self._turn, self._next.get(key, 0))
