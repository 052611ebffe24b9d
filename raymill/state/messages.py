"""Knows what messages cost: counts them before anything is sent, and joins buckets whose messages
would be too short."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raymill.state.flat_layout import NUM_SENDINGS
from raymill.state.span import Span

LEAST_MESSAGE = 1 << 18
"""Values of fp32 in 1 MiB: a shorter message takes longer to begin than to send."""

_SHARE_TO_BEGIN = 0.25
"""The share of such a message's time that goes by before its first byte: 5 us beside 20 us for its
bytes at 50 GB/s."""

_LEAST_NUM_BUNDLES = 16


class Message(NamedTuple):
    sender: int
    receiver: int
    share: float  # of a bucket


def most_cost(messages: Iterable[Message], num_peers: int) -> float:
    """Returns how long the peer sends that takes longest, where a bucket's values take 1 and a part
    of it is as short as a message may be."""
    costs = [0.0] * num_peers
    for message in messages:
        costs[message.sender] += message.share + _SHARE_TO_BEGIN / num_peers
    return max(costs)


def joined(sizes: NDArray[np.int64], num_peers: int) -> list[range]:
    """Returns the numbers of the neighboring buckets of these sizes (N,) that go together, so that
    the shortest messages, of one peer's part, are not too short.

    The last ones are exchanged when backward is over: so sixteen are left or more, if there are as
    many buckets.
    """
    ends = sizes.cumsum()
    least = min(num_peers * LEAST_MESSAGE, int(sizes.sum()) // _LEAST_NUM_BUNDLES)
    bundles: list[range] = []
    first = 0
    while first < len(sizes):
        num_before = ends[first] - sizes[first]
        last = max(first, int(ends.searchsorted(num_before + least)))
        stop = min(last + 1, len(sizes))
        bundles.append(range(first, stop))
        first = stop
    return bundles


def joined_buckets(buckets: Sequence[Span], num_peers: int) -> list[Sequence[Span]]:
    """Returns the buckets that go together."""
    sizes = np.array([len(bucket) for bucket in buckets], np.int64)
    return [buckets[numbers.start : numbers.stop] for numbers in joined(sizes, num_peers)]


def numbers_of_sendings(num_buckets: int) -> list[range]:
    """Returns the numbers of the buckets that are updated together, and sent while the next ones
    are updated."""
    sendings: list[range] = []
    for number in range(NUM_SENDINGS):
        start = number * num_buckets // NUM_SENDINGS
        stop = (number + 1) * num_buckets // NUM_SENDINGS
        if start < stop:
            sendings.append(range(start, stop))
    return sendings
