"""Notes what ranks add up at a few blocks of the gradient, so that others can add it up again.

In an audited step every rank notes there the gradients of its turns, and each sum that it makes of
them: those of its own subtrees, those with others on the way to the root, and the whole sum that it
holds in the end. Every rank gets the notes of all, adds up the tree by itself, and shows a checksum
of each sum that somebody noted. The rank that made the first wrong one was wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.exact.audits.checksum import checksum, words_of
from jobs.exact.audits.silent_faults import corrupt
from raymill.observer import StepObserver
from raymill.state.bundle import Bundle
from raymill.state.span import PackedSpans, Span
from raymill.state.train_state import TrainState
from raymill.sums.exact_reduce import halves
from raymill.sums.step_plan import StepPlan
from raymill.workers.worker_group import WorkerGroup


class Leaf(NamedTuple):
    """The gradient of one turn at all places of the excerpt."""

    number: int  # of its micro-batch, of several that are a lane the first
    values: Tensor


class NotedSum(NamedTuple):
    """The sum of some lanes at a stretch of the layout, as one rank has it."""

    lanes: range  # none where it is no sum, but what an update has made
    start: int
    values: Tensor
    is_last: bool = False  # what the rank holds when all is exchanged

    @property
    def span(self) -> Span:
        return Span(self.start, self.start + len(self.values))


class Notes(NamedTuple):
    """What one rank has noted in a step."""

    leaves: list[Leaf]
    sums: list[NotedSum]


@dataclass(frozen=True)
class ShownSum:
    """A noted sum by its checksum."""

    rank: int
    lanes: range
    span: Span  # of the layout
    is_last: bool
    checksum: int


class Repeated(NamedTuple):
    """Sums that ranks noted in a step, and what each rank found when it added up the same."""

    shown: list[ShownSum]
    answers: list[list[int]]  # of each sum: by rank


class Excerpt(StepObserver):
    """One rank's notes of one step, at `span` of the layout: whole blocks."""

    def __init__(self, span: Span, plan: StepPlan, state: TrainState) -> None:
        sums_parts = state.sharding.divided.gradient
        self._span, self._plan, self._state = span, plan, state
        buffers = state.owned if sums_parts else state.layout.whole
        self._homes = [*PackedSpans([span]).overlaps(buffers)]  # here, and in the sums' buffers
        self._notes = Notes([], [])
        self._leaves: dict[int, Tensor] = {}  # by the number of a turn's first micro-batch
        # Of each bundle, the first places in the layout, and where they are among packed values
        self._places: dict[Bundle, list[tuple[int, Span]]] = {}

    def begin(self, plan: StepPlan, buffers: Sequence[Tensor]) -> None:
        # Nobody writes between parameters: what was wrong there once would stay, on all ranks
        for buffer in buffers:
            buffer.zero_()

    def gradient(self, numbers: Sequence[int], name: str, values: Tensor) -> None:
        """Notes it, unless the turn does not count."""
        [first, *_] = numbers
        if first not in self._plan.counted[self._state.sharding.rank]:
            return
        if first not in self._leaves:
            leaf = torch.zeros(len(self._span), device=self._state.device)
            self._leaves[first] = leaf
            self._notes.leaves.append(Leaf(first, leaf))
        place = self._state.layout.places[name]
        overlap = place & self._span
        if not overlap.is_empty:
            own = overlap.shifted(-place.start).of(values.flatten())
            overlap.shifted(-self._span.start).of(self._leaves[first]).copy_(own)

    def subtree(self, lanes: range, bundle: Bundle, values: Tensor) -> None:
        self.node(lanes, bundle, Span(0, len(values)), values)

    def node(self, lanes: range, bundle: Bundle, span: Span, values: Tensor) -> None:
        for start, place in self._places_of(bundle):
            overlap = place & span
            if not overlap.is_empty:
                copied = overlap.of(values).clone()
                noted = NotedSum(lanes, start + overlap.start - place.start, copied)
                self._notes.sums.append(noted)

    def _places_of(self, bundle: Bundle) -> list[tuple[int, Span]]:
        if bundle not in self._places:
            places: list[tuple[int, Span]] = []
            for in_excerpt, in_buffer in self._homes:
                to_layout = self._span.start + in_excerpt.start - in_buffer.start
                for flat, packed in bundle.packed_places(in_buffer):
                    places.append((flat.start + to_layout, packed))
            self._places[bundle] = places
        return self._places[bundle]

    def repeated(self, group: WorkerGroup) -> Repeated:
        """Notes what this rank holds once all is exchanged. Returns the sums for which a rank finds
        another value than was noted; all call together."""
        root = range(self._plan.num_lanes)
        kept = self._state.kept("gradient")
        for span in (PackedSpans([self._span]) & self._state.owned).spans:
            values = kept.home_of(span).of(self._state.gradient).clone()
            self._notes.sums.append(NotedSum(root, span.start, values, is_last=True))
        notes = group.gather(_on_host(self._notes))
        sums: list[tuple[int, NotedSum]] = []
        for rank, noted in enumerate(notes):
            sums += [(rank, one) for one in noted.sums]
        return disputed(group, sums, self._differing(notes, [one for _, one in sums]))

    def _differing(self, notes: Iterable[Notes], sums: Iterable[NotedSum]) -> dict[int, int]:
        """Adds up the sums that ranks have noted, of their leaves. Returns by its number the
        checksum of each that is another one."""
        lanes = self._lanes(notes)
        known: dict[range, Tensor] = {}

        def sum_of(node: range) -> Tensor:
            if len(node) == 1:
                return lanes[node.start]
            if node not in known:
                left, right = halves(node)
                known[node] = sum_of(left) + sum_of(right)
            return known[node]

        differing: dict[int, int] = {}
        for number, noted in enumerate(sums):
            values = noted.span.shifted(-self._span.start).of(sum_of(noted.lanes))
            corrupt("added_again", values)
            if not torch.equal(words_of(values), words_of(noted.values.to(values.device))):
                differing[number] = checksum_of(values, noted.start)
        return differing

    def _lanes(self, notes: Iterable[Notes]) -> list[Tensor]:
        """Returns each lane's gradient: the sum of its micro-batches, in order."""
        pieces: dict[int, Tensor] = {}
        for noted in notes:
            for number, values in noted.leaves:
                pieces[number] = values.to(self._state.device)
        lanes: list[Tensor] = []
        for lane in range(self._plan.num_lanes):
            k = self._plan.num_micro_batches
            numbers = [number for number in range(lane * k, (lane + 1) * k) if number in pieces]
            [first, *others] = numbers
            total = pieces[first]
            for number in others:
                total = total + pieces[number]
            lanes.append(total)
        return lanes


def disputed(
    group: WorkerGroup, noted: Sequence[tuple[int, NotedSum]], differing: Mapping[int, int]
) -> Repeated:
    """Returns what ranks have noted, each with its rank, where somebody found something else.
    `differing` has the checksums that this rank found, by number; all call together."""
    of_ranks = group.gather(differing)
    repeated = Repeated([], [])
    for number, (rank, one) in enumerate(noted):
        if not any(number in of_rank for of_rank in of_ranks):
            continue
        shown = checksum_of(one.values, one.start)
        answers = [of_rank.get(number, shown) for of_rank in of_ranks]
        if {*answers} != {shown}:
            repeated.shown.append(ShownSum(rank, one.lanes, one.span, one.is_last, shown))
            repeated.answers.append(answers)
    return repeated


def _on_host(notes: Notes) -> Notes:
    leaves = [leaf._replace(values=leaf.values.cpu()) for leaf in notes.leaves]
    sums = [noted._replace(values=noted.values.cpu()) for noted in notes.sums]
    return Notes(leaves, sums)


def checksum_of(values: Tensor, start: int) -> int:
    """Returns a checksum from 0 to 2^64 - 1. Which NaN a sum is depends on the order of its two
    terms, which is free."""
    one_nan = values.masked_fill(values.isnan(), torch.nan)
    return int(checksum(one_nan, start=start)) % (1 << 64)
