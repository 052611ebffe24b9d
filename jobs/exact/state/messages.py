"""Knows what messages cost: counts them before anything is sent, and joins buckets whose messages
would be too short."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from jobs.exact.state.flat_layout import NUM_SENDINGS, FlatLayout
from jobs.exact.state.span import Span

LEAST_MESSAGE = 1 << 18
"""Values of fp32 in 1 MiB: a shorter message takes longer to begin than to send."""

_SHARE_TO_BEGIN = 0.25
"""Of such a message's time: 5 us to begin, by 20 us for its bytes at 50 GB/s."""

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


def joined_buckets(buckets: Sequence[Span], num_peers: int) -> list[Sequence[Span]]:
    """Joins neighboring buckets so that the shortest messages, of one peer's part, are not too
    short.

    The last ones are exchanged when backward is over: so sixteen are left or more, if there are as
    many buckets.
    """
    num_values = sum(map(len, buckets))
    least = min(num_peers * LEAST_MESSAGE, num_values // _LEAST_NUM_BUNDLES)
    joined: list[Sequence[Span]] = []
    together: list[Span] = []
    num_together = 0
    for bucket in buckets:
        together.append(bucket)
        num_together += len(bucket)
        if num_together >= least:
            joined.append(together)
            together, num_together = [], 0
    if together:
        joined.append(together)
    return joined


@lru_cache(maxsize=256)
def bundles_between_groups(
    layout: FlatLayout, *, group_size: int, num_groups: int
) -> list[Sequence[Span]]:
    """Returns the buckets, or the first member's parts of them, that go together from one group to
    the others. A planner asks for the same ones again and again."""
    buckets: Sequence[Span] = layout.buckets
    if group_size > 1:
        buckets = layout.parts(0, world_size=group_size).homes
    return joined_buckets(buckets, num_groups)


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
