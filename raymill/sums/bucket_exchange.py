"""Finishes the sum of a step's gradient among ranks, its peers, while backward continues.

The sum is one binary tree over all lanes (`exact_reduce`), whichever peer computed a lane: so its
bits do not depend on the number of peers. Each peer comes with the sums of some subtrees, those of
its own lanes. The peers finish the tree by halving (`halving`), after which each has its part of
the whole sum. Unless only the part's owner needs it, they bring the parts together by doubling
(`state/doubling`). With a power of two of peers that is as many bytes as a ring all-reduce sends,
in fewer messages. Messages go from and into permanent buffers.

While a bundle's parts are brought together, the next bundle is halved: a link idles while a peer
adds or waits for another one, so two bundles on their way took 8 to 24% less time over links of 100
Mbit/s (`tests/benchmarks/bench_slow_link.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from raymill.observer import StepObserver
from raymill.side_thread import SideStream, SideThread, side_work
from raymill.state.bundle import Bundle, bundles_of
from raymill.state.peers import Peers
from raymill.state.span import Span
from raymill.sums.halving import HalvedSums, Room
from raymill.sums.step_totals import block_square_sums
from raymill.sums.teams import TeamPlan

GATHER_TAG = 2  # of these messages: gloo keeps them apart from those of halving, in another thread


class BucketExchange:
    """Exchanges the sums in `buffers`, each as long as the gradient.

    The first of them hold this peer's subtree sums, one each, and the very first becomes the whole
    sum. With `parts`, as with a sharded optimizer, each peer owns its part of each bucket, and only
    its own parts become whole.
    """

    def __init__(
        self,
        buckets: Sequence[Span],
        buffers: list[Tensor],
        peers: Peers,
        *,
        parts: Sequence[Sequence[Span]] | None,
        square_sums: Callable[[Tensor], Tensor] = block_square_sums,
    ) -> None:
        self._square_sums = square_sums
        self._buffers = buffers
        self._peers = peers
        self._is_owned = parts is not None
        self._room = Room(buffers[0].device)
        self._bundles: dict[int, Bundle] = {}  # by the number of the last bucket
        last = -1
        for bundle in bundles_of(buckets, len(peers), parts=parts):
            last += bundle.num_buckets
            self._bundles[last] = bundle
        self._gathers: SideThread | SideStream | None = None
        if len(peers) > 1 and not self._is_owned:
            self._gathers = side_work(buffers[0].device)
        self.block_sums: list[Tensor] = []
        """The sums of squares (`step_totals`) of this peer's parts of the whole sum, in order."""

    def begin(
        self, plan: TeamPlan, *, subtrees: Sequence[range], observers: Sequence[StepObserver] = ()
    ) -> None:
        """Prepares for the buckets of a step to which this peer comes with the sums of these
        subtrees."""
        self._sums = HalvedSums(self._peers, plan, self._room)
        self._subtrees = subtrees
        self._observers = observers
        self.block_sums = []

    def exchange(self, bucket: int) -> None:
        """Exchanges a bucket whose subtree sums are final, with those before it of its bundle.
        Every peer takes the buckets in order. The sum is whole once `wait` returns."""
        bundle = self._bundles.get(bucket)
        if bundle is None:
            return
        vectors = [bundle.packed(buffer) for buffer in self._buffers[: len(self._subtrees)]]
        for observer in self._observers:
            for lanes, vector in zip(self._subtrees, vectors, strict=True):
                observer.subtree(lanes, bundle, vector)
        seen = partial(self._see, bundle) if self._observers else None
        self._sums.finish(vectors, bundle.division, seen)
        result = bundle.division.part(self._peers.index).of(vectors[0])
        self.block_sums.append(self._square_sums(result))
        if self._is_owned:
            bundle.unpack_part(vectors[0], self._buffers[0], self._peers.index)
        elif self._gathers:
            self._gathers.submit(self._gather, bundle)

    def _see(self, bundle: Bundle, lanes: range, span: Span, vector: Tensor) -> None:
        for observer in self._observers:
            observer.node(lanes, bundle, span, vector)

    def wait(self) -> None:
        """Waits until the parts of all buckets are together."""
        if self._gathers:
            self._gathers.wait()

    def close(self) -> None:
        """Ends the work beside the caller."""
        if self._gathers:
            self._gathers.close()

    def _gather(self, bundle: Bundle) -> None:
        bundle.gather(self._peers, self._buffers[0], tag=GATHER_TAG)
