"""Ends a round of the workers' meetings from outside: for a round without the lost ones, or to see
which workers have left it since.

Where a lost worker is replaced, the replacement ends the round (`rendezvous`). Where its node is
lost nobody comes, and a worker whose message waits for the lost one may hear of nothing: a machine
that loses its power closes no connection, and NCCL reports no lost peer.
"""

from collections.abc import Collection, Iterable
from datetime import timedelta

import torch.distributed as dist

from jobs.workers.seats import Rounds, Seats

_ANSWER = timedelta(seconds=5)


def vacate(address: str, *, group: str, num_seats: int, seats: Collection[int]) -> None:
    """Lets the other workers of a group, which was started with `num_seats`, meet without these.
    Raises `RuntimeError` where the meeting place at this address, or the group, is not there."""
    Seats(_store(address, group), num_seats).vacate(seats)


class RoundEnd:
    """The end of the round in which the workers of some seats were lost."""

    def __init__(self, address: str, *, group: str, lost: Iterable[int]) -> None:
        """Ends the round, unless a worker has done so already. Raises what `vacate` does."""
        self._store = _store(address, group)
        table = Rounds(self._store)
        self._next = table.round()
        # The lost took part in the round before, and come to no other
        if any(self.is_left_by(seat) for seat in lost):
            table.end(self._next)
            self._next += 1

    def is_left_by(self, seat: int) -> bool:
        """Reports whether the worker of this seat waits for the next round: by then it has rescued
        its state."""
        return bool(self._store.check([f"{self._next}/{seat}/came"]))


def _store(address: str, group: str) -> dist.Store:
    host, _, port = address.rpartition(":")
    place = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_ANSWER)
    return dist.PrefixStore(group, place)
