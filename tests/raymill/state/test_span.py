"""Spans against sets of the places that they have, and packed spans against the values that they
pick out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from raymill.state.span import PackedSpans, Span

SIZE = 60

spans = st.builds(Span, st.integers(0, SIZE), st.integers(0, SIZE))


@st.composite
def packed_spans(draw: st.DrawFn) -> PackedSpans:
    """Draws spans in order without a place in common, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, SIZE), max_size=14)))
    return PackedSpans([Span(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=False)])


def places(span: Span) -> set[int]:
    return set(range(span.start, span.stop))


def values_of(packed: PackedSpans) -> list[int]:
    """Returns the packed vector of a vector whose values are their places."""
    values: list[int] = []
    for span in packed.spans:
        values += range(span.start, span.stop)
    return values


@given(spans, spans, st.integers(-SIZE, SIZE))
def test_a_span_is_the_set_of_its_places(a: Span, b: Span, by: int) -> None:
    assert places(a & b) == places(a) & places(b)
    assert len(a) == len(places(a))
    assert a.is_empty == (not places(a))
    assert places(a.shifted(by)) == {place + by for place in places(a)}
    assert a.of(torch.arange(SIZE)).tolist() == sorted(places(a))


@given(packed_spans(), spans)
def test_packed_spans_lie_end_to_end_and_are_cut_where_their_values_are(
    packed: PackedSpans, cut: Span
) -> None:
    values = values_of(packed)
    assert packed.num_values == len(values)
    for span, home in zip(packed.spans, packed.homes, strict=True):
        assert values[home.start : home.stop] == sorted(places(span))
    assert values_of(PackedSpans(packed.cut(cut))) == values[cut.start : max(cut.start, cut.stop)]


@given(packed_spans(), packed_spans())
def test_overlaps_pair_equal_values_and_leave_none_out(a: PackedSpans, b: PackedSpans) -> None:
    a_values, b_values = values_of(a), values_of(b)
    shared: list[int] = []
    for in_a, in_b in a.overlaps(b):
        values = a_values[in_a.start : in_a.stop]
        assert values == b_values[in_b.start : in_b.stop]
        shared += values
    assert shared == sorted(set(a_values) & set(b_values))


@given(packed_spans(), packed_spans())
def test_what_lies_in_two_packed_spans__is_in_each_of_them_and_has_a_home(
    packed: PackedSpans, other: PackedSpans
) -> None:
    common = packed & other
    assert values_of(common) == sorted(set(values_of(packed)) & set(values_of(other)))
    for span in common.spans:
        home = packed.home_of(span)
        assert values_of(packed)[home.start : home.stop] == sorted(places(span))
