"""A layout whose matrices have one owner each: no part cuts one, and ranks have about as much to
do."""

import itertools
from collections import Counter
from collections.abc import Mapping
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings.run import RunConfig
from jobs.exact.run_values import update_rule
from model.shapes import hidden_matrices, parameter_shapes
from raymill.rules.rules import matrix_costs
from raymill.state.flat_layout import BLOCK, FlatLayout, part_of
from raymill.state.span import PackedSpans, Span
from raymill.state.whole_matrices import WholeMatrix, parts_of_matrices

Shapes = Mapping[str, tuple[int, ...]]


@st.composite
def shapes_of_decoders(draw: st.DrawFn) -> Shapes:
    """Parameters in a model's order: odd sizes, blocks unlike each other, matrices larger than a
    block of values and smaller ones, and some that may be cut between them."""
    side = st.integers(1, 300)
    shapes: dict[str, tuple[int, ...]] = {"model.wte.weight": (draw(side), draw(side))}
    for block in range(draw(st.integers(1, 4))):
        for number in range(draw(st.integers(1, 9))):
            shapes[f"model.h.{block}.m{number}.weight"] = (draw(side), draw(side))
            shapes[f"model.h.{block}.m{number}.bias"] = (draw(side),)
        shapes[f"model.h.{block}.experts"] = (3, draw(side), 5)
        shapes[f"model.h.{block}.last.weight"] = (draw(side), draw(side))
    shapes["model.ln_f.weight"] = (draw(side),)
    if draw(st.booleans()):
        shapes["lm_head.weight"] = (draw(side), draw(side))
    return shapes


def costs_of(shapes: Shapes) -> dict[str, float]:
    """The matrices of blocks, and the number of their values."""
    return {
        name: float(prod(shape))
        for name, shape in shapes.items()
        if ".h." in name and len(shape) == 2
    }


@given(shapes_of_decoders(), st.integers(1, 9))
@settings(deadline=None)
def test_parts__of_a_layout_of_matrices__have_each_whole_and_are_as_even_as_that_allows(
    shapes: Shapes, world_size: int
) -> None:
    layout = FlatLayout.of(shapes, matrix_costs=costs_of(shapes))
    matrices = costs_of(shapes)
    assert sorted(layout.matrices) == sorted(matrices)
    parts_of_ranks = [layout.parts(rank, world_size=world_size) for rank in range(world_size)]
    owners: Counter[str] = Counter()
    for parts in parts_of_ranks:
        for name, in_parameter, _ in layout.pieces(parts):
            if name in matrices and in_parameter == Span(0, prod(shapes[name])):
                owners[name] += 1
    assert owners == dict.fromkeys(matrices, 1), "each is one rank's, and in one piece"

    end = 0
    for bucket, division in zip(layout.buckets, layout.divided(world_size), strict=True):
        assert bucket.start == division[0].start == end
        assert all(before.stop == after.start for before, after in itertools.pairwise(division))
        assert all(part.start % BLOCK == len(part) % BLOCK == 0 for part in division)
        end = division[-1].stop
        assert end == bucket.stop
    assert end == layout.size, "each value is covered once"

    loads = [parts.num_values for parts in parts_of_ranks]
    num_buckets = len(layout.buckets)
    longest = max(map(len, layout.buckets))
    # Parts of other buckets differ by a block at most, and a matrix is padded by less than one.
    slack = (num_buckets + len(matrices)) * BLOCK
    assert max(loads) <= layout.size / world_size + longest + slack


@given(shapes_of_decoders(), st.integers(1, 9))
@settings(deadline=None)
def test_stretches__of_any_part__are_its_matrices_and_what_lies_between(
    shapes: Shapes, world_size: int
) -> None:
    layout = FlatLayout.of(shapes, matrix_costs=costs_of(shapes))
    named: list[str] = []
    for rank in range(world_size):
        for part in layout.parts(rank, world_size=world_size).spans:
            for name, place in layout.stretches(part):
                assert part.start <= place.start < place.stop <= part.stop
                if name is None:
                    inside = PackedSpans([place]) & layout.in_matrices
                    assert inside.num_values == 0
                else:
                    assert place == layout.places[name]
                    named.append(name)
    assert sorted(named) == sorted(costs_of(shapes))
    inside, outside = layout.in_matrices, layout.outside_matrices
    assert inside.num_values + outside.num_values == layout.size
    assert (inside & outside).num_values == 0


@given(shapes_of_decoders(), st.integers(1, 9))
@settings(deadline=None)
def test_layout__for_a_rule_of_values__knows_nothing_of_matrices(
    shapes: Shapes, world_size: int
) -> None:
    """What every recorded run has: parts as even as blocks of values allow, parameters at multiples
    of 64 bytes."""
    layout = FlatLayout.of(shapes)
    ends = [-(-place.stop // 16) * 16 for place in layout.places.values()]
    assert [place.start for place in layout.places.values()] == [0, *ends[:-1]]
    assert layout.matrices == {}
    for bucket, parts in zip(layout.buckets, layout.divided(world_size), strict=True):
        assert parts == [part_of(bucket, rank, world_size=world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_matrices_of_a_real_shape__cost_ranks_about_the_same(world_size: int) -> None:
    config = RunConfig.model_validate(
        {"model": {"preset": "gpt2-124m"}, "train": {"optimizer": "muon"}}
    )
    shapes = parameter_shapes(config.model)
    costs = matrix_costs(update_rule(config.train), hidden_matrices(config.model))
    layout = FlatLayout.of(shapes, matrix_costs=costs)
    work = [0.0] * world_size
    for rank in range(world_size):
        for part in layout.parts(rank, world_size=world_size).spans:
            work[rank] += sum(costs[name] for name, _ in layout.stretches(part) if name)
    assert max(work) <= 1.1 * sum(costs.values()) / world_size
    loads = [layout.parts(rank, world_size=world_size).num_values for rank in range(world_size)]
    assert max(loads) <= 1.1 * layout.size / world_size
    assert layout.size <= 1.001 * FlatLayout.of(shapes).size
    assert max(map(len, layout.buckets)) * 4 <= 29e6


def test_a_matrix_that_costs_more__goes_to_who_has_least_to_do() -> None:
    costs = [5.0, 1.0, 9.0]
    matrices = [WholeMatrix(Span(0, BLOCK), 1.0), WholeMatrix(Span(BLOCK, 4 * BLOCK), 4.0)]
    parts = parts_of_matrices(matrices, costs)
    assert parts == [Span(0, BLOCK), Span(BLOCK, 4 * BLOCK), Span(4 * BLOCK, 4 * BLOCK)]
    assert costs == [6.0, 5.0, 9.0]
