"""Ends a round of the workers' meetings from outside, and shows which workers have left it since.

Where a lost worker is replaced, the replacement ends the round (`rendezvous`). Where its node is
lost nobody comes, and a worker whose message waits for the lost one may hear of nothing: a machine
that loses its power closes no connection, and NCCL reports no lost peer.
"""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

_ANSWER = timedelta(seconds=5)


class RoundEnd:
    """The end of the round in which some ranks were lost."""

    def __init__(self, address: str, *, group: str, lost: Iterable[int]) -> None:
        """Ends the round, unless a worker has done so already. Raises `RuntimeError` where the
        meeting place at this address, or the group, is not there."""
        host, _, port = address.rpartition(":")
        place = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=_ANSWER
        )
        self._store = dist.PrefixStore(group, place)
        self._next = int(self._store.get("round"))
        # The lost took part in the round before, and come to no other
        if any(self.is_left_by(rank) for rank in lost):
            self._store.compare_set("round", str(self._next), str(self._next + 1))
            self._next += 1

    def is_left_by(self, rank: int) -> bool:
        """Reports whether the worker of this rank waits for the next round: by then it has rescued
        its state."""
        return bool(self._store.check([f"{self._next}/{rank}/came"]))
