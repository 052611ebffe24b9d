"""Peers that are threads of this process: what one sends another takes from a queue, and messages
are counted."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TypeVar, cast

from torch import Tensor

from raymill.state.peers import Peers, Tensors
from tests.time_limits import limit_s

T = TypeVar("T")

Wires = dict[tuple[int, int], "Queue[Tensor]"]
"""By sender and receiver."""


class WiredPeers:
    """What one of the threads has for `Peers`."""

    def __init__(self, index: int, wires: Wires, num_peers: int) -> None:
        self.index = index
        self.sent: list[tuple[int, int]] = []  # the receiver and the number of values
        self.num_calls = 0
        self._wires = wires
        self._num_peers = num_peers

    def __len__(self) -> int:
        return self._num_peers

    def pass_on(
        self, sent: Sequence[Tensors], received: Sequence[Tensors], *, tag: int = 0
    ) -> None:
        self.num_calls += 1
        kept = [values for peer, tensors in sent for values in tensors if peer == self.index]
        places = [values for peer, tensors in received for values in tensors if peer == self.index]
        for place, values in zip(places, kept, strict=True):
            place.copy_(values)
        for peer, tensors in sent:
            for values in filter(len, tensors):
                if peer != self.index:
                    self._wires[self.index, peer].put(values.clone())
                    self.sent.append((peer, len(values)))
        for peer, tensors in received:
            for target in filter(len, tensors):
                if peer != self.index:
                    values = self._wires[peer, self.index].get(timeout=limit_s(10))
                    assert len(values) == len(target), "who sends and who receives do not agree"
                    target.copy_(values)


def run_peers(num_peers: int, run: Callable[[Peers], T]) -> tuple[list[T], list[WiredPeers]]:
    """Returns what `run` returns to each of the peers, and the peers with what they sent."""
    pairs = [(sender, peer) for sender in range(num_peers) for peer in range(num_peers)]
    wires: Wires = {pair: Queue() for pair in pairs}
    peers = [WiredPeers(index, wires, num_peers) for index in range(num_peers)]
    with ThreadPoolExecutor(num_peers) as threads:
        results = [*threads.map(run, cast(list[Peers], peers))]
    assert all(wire.empty() for wire in wires.values()), "something was sent that nobody took"
    assert len({peer.num_calls for peer in peers}) == 1, "the peers count different messages"
    return results, peers
