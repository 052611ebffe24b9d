"""Where the node-seconds of a replayed trace went: pure arithmetic on a contender's record.

Every second of every node that was there is of one kind (`Kind`), so the kinds sum to what was
there. A step stands unless a later group took its number again.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise

from tests.benchmarks.goodput.records import Event, Mark, NodeCount, Record, Step


class Kind(StrEnum):
    """What a node's second was."""

    USEFUL = "useful"  # the stated time of rows in steps that stand
    SLOW = "slow"  # what those steps took beyond it: exchange, saving, computing
    IDLE = "idle"  # of a node that no worker used while others trained
    DETECTING = "detecting"  # from the change of nodes until something was done about it
    MEETING = "meeting"  # from then until the workers were connected; their processes start
    LOADING = "loading"  # from then until all had the state to continue from
    RECOMPUTING = "recomputing"  # steps that were taken again, and unfinished ones


@dataclass(frozen=True)
class Account:
    """The figures of one contender on one trace."""

    node_seconds: dict[Kind, float]
    without_nodes_s: float  # seconds in which there was no node at all
    rows: int  # in steps that stand, within the clock
    num_steps: int  # that stand, within the clock
    num_again: int  # steps that were completed and did not stand
    repeated: int  # times that a sample counts again, in the steps that stand of the whole run
    never: int  # samples before the furthest one that count in none of them
    weights: dict[int, str]  # hashes after steps that stand, by step

    @property
    def there(self) -> float:
        """The node-seconds that were there."""
        return sum(self.node_seconds.values())

    @property
    def goodput(self) -> float:
        """The share of what the nodes that were there could have done."""
        return self.node_seconds[Kind.USEFUL] / self.there

    def dollars_per_million_tokens(self, *, row_tokens: int, price_per_node_hour: float) -> float:
        """Raises `ZeroDivisionError` where nothing was trained."""
        return self.there / 3600 * price_per_node_hour / (self.rows * row_tokens / 1e6)


def account(record: Record, *, row_s: float) -> Account:
    """Accounts for a run whose rows take `row_s` seconds of a node each."""
    standing = standing_steps(record.steps)
    nodes = Nodes(record.nodes)
    seconds = dict.fromkeys(Kind, 0.0)
    for kind, amount in _pieces(record, standing, nodes, row_s=row_s):
        seconds[kind] += amount
    timed = [step for step in standing if record.start_s < step.time_s <= record.end_s]
    repeated, never = samples_repeated_and_never(standing)
    completed = [step for step in record.steps if record.start_s < step.time_s <= record.end_s]
    return Account(
        node_seconds=seconds,
        without_nodes_s=nodes.seconds_without(record.start_s, record.end_s),
        rows=sum(len(step.samples) for step in timed),
        num_steps=len(timed),
        num_again=len(completed) - len(timed),
        repeated=repeated,
        never=never,
        weights={step.number: step.weights for step in standing if step.weights},
    )


def standing_steps(steps: Sequence[Step]) -> list[Step]:
    """Returns the steps that count: one that is completed takes back all of its number or a higher
    one from before."""
    standing: list[Step] = []
    for step in steps:
        while standing and standing[-1].number >= step.number:
            standing.pop()
        standing.append(step)
    return standing


def samples_repeated_and_never(standing: Sequence[Step]) -> tuple[int, int]:
    """Returns how often samples count again, and how many before the furthest one count in no
    step."""
    counts = Counter(sample for step in standing for sample in step.samples)
    repeated = sum(counts.values()) - len(counts)
    return repeated, (max(counts) + 1 - len(counts) if counts else 0)


class Nodes:
    """The number of nodes over time."""

    def __init__(self, counts: Sequence[NodeCount]) -> None:
        self._counts = list(counts)
        self._times = [count.time_s for count in counts]

    def seconds(self, start_s: float, end_s: float, *, beyond: int = 0) -> float:
        """Returns the node-seconds between two times, of the nodes beyond a number of them."""
        stretches = self._stretches(start_s, end_s)
        return sum(length_s * max(0, nodes - beyond) for length_s, nodes in stretches)

    def seconds_without(self, start_s: float, end_s: float) -> float:
        return sum(length for length, nodes in self._stretches(start_s, end_s) if nodes == 0)

    def first_loss(self, start_s: float, end_s: float) -> float | None:
        """Returns when nodes were first lost between two times."""
        for before, after in pairwise(self._counts):
            if start_s <= after.time_s < end_s and after.nodes < before.nodes:
                return after.time_s
        return None

    def _stretches(self, start_s: float, end_s: float) -> Iterator[tuple[float, int]]:
        """Yields the length in seconds and the nodes of each stretch between two times."""
        index = max(0, bisect_right(self._times, start_s) - 1)
        while start_s < end_s and index < len(self._counts):
            is_last = index + 1 == len(self._counts)
            until_s = end_s if is_last else min(end_s, self._times[index + 1])
            yield max(0.0, until_s - start_s), self._counts[index].nodes
            start_s, index = max(start_s, until_s), index + 1


def _pieces(
    record: Record, standing: Sequence[Step], nodes: Nodes, *, row_s: float
) -> Iterator[tuple[Kind, float]]:
    """Yields kinds and node-seconds that together are all that were there within the clock."""
    stands = {id(step) for step in standing}
    timed = [step for step in record.steps if record.start_s < step.time_s <= record.end_s]
    start_s = record.start_s
    for step in timed:
        useful = len(step.samples) * row_s
        # Whatever else happened, a step takes its rows' time: a mark in it is of who joins later
        latest_s = max(start_s, step.time_s - useful / step.world_size)
        began_s, lost = _interruption(record.marks, nodes, start_s, latest_s)
        yield from lost
        there = nodes.seconds(began_s, step.time_s)
        if id(step) in stands:
            idle = nodes.seconds(began_s, step.time_s, beyond=step.world_size)
            yield Kind.USEFUL, useful
            yield Kind.IDLE, idle
            yield Kind.SLOW, there - useful - idle
        else:
            yield Kind.RECOMPUTING, there
        start_s = step.time_s
    began_s, lost = _interruption(record.marks, nodes, start_s, record.end_s)
    yield from lost
    loss_s = nodes.first_loss(began_s, record.end_s)
    until_s = record.end_s if loss_s is None else loss_s
    # No unfinished step lasts longer than one worker takes; then a group is waited for
    longest_s = max((len(step.samples) for step in record.steps), default=0) * row_s
    unfinished_s = min(until_s, began_s + longest_s)
    yield Kind.RECOMPUTING, nodes.seconds(began_s, unfinished_s)
    yield Kind.MEETING, nodes.seconds(unfinished_s, until_s)
    yield Kind.DETECTING, nodes.seconds(until_s, record.end_s)


def _interruption(
    marks: Sequence[Mark], nodes: Nodes, start_s: float, latest_s: float
) -> tuple[float, list[tuple[Kind, float]]]:
    """Returns when the step after `start_s` began, `latest_s` at the latest, and the kinds and
    node-seconds of what came before that. A step without marks of a new group had no interruption:
    a node that was lost meanwhile was lost to the next one."""
    times: dict[Event, list[float]] = {event: [] for event in Event}
    lost_s = nodes.first_loss(start_s, latest_s)
    change_s = start_s if lost_s is None else lost_s
    for mark in marks:
        if start_s < mark.time_s <= latest_s:
            times[mark.event].append(max(mark.time_s, change_s))
    if not any(times.values()):
        return start_s, []
    loaded_s = max(chain.from_iterable(times.values()))
    started_s = min(times[Event.STARTED], default=change_s)
    met_s = max(times[Event.MET], default=loaded_s if not times[Event.LOADED] else started_s)
    met_s = max(started_s, met_s)
    return loaded_s, [
        (Kind.RECOMPUTING, nodes.seconds(start_s, change_s)),
        (Kind.DETECTING, nodes.seconds(change_s, started_s)),
        (Kind.MEETING, nodes.seconds(started_s, met_s)),
        (Kind.LOADING, nodes.seconds(met_s, loaded_s)),
    ]
