"""Spans of a flat vector: neighboring values, by the place of the first and the place after the
last."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """The values of a vector from `start` to before `stop`; it has none where it does not stop
    after its start."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: "Span") -> "Span":
        """Returns the values that lie in this span and in the other one."""
        start = max(self.start, other.start)
        stop = min(self.stop, other.stop)
        return Span(start, stop)

    @property
    def is_empty(self) -> bool:
        return self.stop <= self.start

    def meets(self, other: "Span") -> bool:
        """Reports whether a value lies in both."""
        return not (self & other).is_empty

    def shifted(self, by: int) -> "Span":
        return Span(self.start + by, self.stop + by)

    def of(self, vector: "Tensor") -> "Tensor":
        """Returns the view of these values of a vector (P,)."""
        return vector[self.start : self.stop]


@dataclass(frozen=True)
class PackedSpans:
    """Spans of a vector, in order, whose values also lie end to end in another vector, the packed
    one."""

    spans: Sequence[Span]

    @cached_property
    def homes(self) -> list[Span]:
        """The place of each span's values in the packed vector."""
        homes: list[Span] = []
        end = 0
        for span in self.spans:
            stop = end + len(span)
            homes.append(Span(end, stop))
            end = stop
        return homes

    @property
    def num_values(self) -> int:
        return self.homes[-1].stop if self.homes else 0

    @cached_property
    def _starts(self) -> list[int]:
        return [span.start for span in self.spans]

    def home_of(self, span: Span) -> Span:
        """Returns where the values of a span, which lies within one of these, lie in the packed
        vector."""
        number = bisect_right(self._starts, span.start) - 1
        assert span.stop <= self.spans[number].stop, f"{span} is in no one of the spans"
        return span.shifted(self.homes[number].start - self.spans[number].start)

    def __and__(self, other: "PackedSpans") -> "PackedSpans":
        """Returns the spans of what lies in these and in the other ones."""
        return PackedSpans([overlap for _, _, overlap in self._meetings(other)])

    def cut(self, packed: Span) -> list[Span]:
        """Returns the spans of the values that lie at `packed` in the packed vector."""
        cuts: list[Span] = []
        for span, home in zip(self.spans, self.homes, strict=True):
            overlap = home & packed
            if not overlap.is_empty:
                cuts.append(overlap.shifted(span.start - home.start))
        return cuts

    def overlaps(self, other: "PackedSpans") -> Iterator[tuple[Span, Span]]:
        """For each overlap with the other spans, yields its place in this packed vector and in the
        other one."""
        for i, j, overlap in self._meetings(other):
            to_home = self.homes[i].start - self.spans[i].start
            to_other_home = other.homes[j].start - other.spans[j].start
            yield overlap.shifted(to_home), overlap.shifted(to_other_home)

    def _meetings(self, other: "PackedSpans") -> Iterator[tuple[int, int, Span]]:
        """Yields each overlap with the other spans, after the numbers of the two."""
        i = j = 0
        while i < len(self.spans) and j < len(other.spans):
            overlap = self.spans[i] & other.spans[j]
            if not overlap.is_empty:
                yield i, j, overlap
            if self.spans[i].stop <= other.spans[j].stop:
                i += 1
            else:
                j += 1
