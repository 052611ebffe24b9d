"""Lays out the parameters in flat buffers, and cuts these into buckets, parts and blocks.

Matrices come first, then the biases and LayerNorms, which have no decay, each in the order in which
backward finishes their gradients. A bucket is exchanged as soon as backward is done with it. Every
rank owns a part of each bucket, in whole blocks. Blocks do not depend on the world size: the
gradient's norm is summed over them.

A rule may update matrices as a whole. Then no part and no bucket cuts one (`whole_matrices`): each
begins with a block, and the matrices of a bucket go to the ranks that have least to do so far.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from raymill.state.span import PackedSpans, Span
from raymill.state.whole_matrices import WholeMatrix, buckets_of_matrices, parts_of_matrices

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # values in a block

PIECE_VALUES = 16 << 20  # copied at a time from a GPU: 64 MiB of fp32, twice in pinned memory

# Stretches of an update that is sent: one is on its way while the next is computed
NUM_SENDINGS = 8

# Parameters start at multiples of 64 bytes, as torch's own allocations do: vector kernels may round
# differently on other alignments.
_ALIGNMENT = 16

_BUCKET_UNIT = 16 * BLOCK  # worlds of up to 16 ranks, if a power of two, divide a bucket evenly
# In any architecture, the first number in a name is its block's
_OF_BLOCK = re.compile(r"\D*\.(\d+)\.")
_MAX_BUCKET = 384 * _BUCKET_UNIT  # 25 MB of fp32, as DistributedDataParallel's


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """The place of each parameter in a flat buffer, in units of values. Layouts are compared by
    identity, so cached properties are safe."""

    places: dict[str, Span]  # by parameter
    boundary: int  # values with decay lie before it
    size: int  # P, in whole blocks
    matrices: dict[str, WholeMatrix] = field(default_factory=dict)  # that no part cuts, in order

    @classmethod
    def of(
        cls, shapes: Mapping[str, Sequence[int]], *, matrix_costs: Mapping[str, float] | None = None
    ) -> "FlatLayout":
        """Lays out parameters by name and shape, given in the model's order
        (`model.shapes.parameter_shapes`). No part cuts a parameter that has a cost, by which they
        are divided among ranks."""
        costs = matrix_costs or {}
        backward_order = [*shapes.items()][::-1]
        # Matrices and embeddings decay; biases and LayerNorms, which are vectors, do not (GPT-3,
        # appendix B).
        matrices = [(name, shape) for name, shape in backward_order if len(shape) >= 2]
        vectors = [(name, shape) for name, shape in backward_order if len(shape) < 2]
        places: dict[str, Span] = {}
        whole: dict[str, WholeMatrix] = {}
        end = 0
        boundary = 0
        for name, shape in matrices + vectors:
            unit = BLOCK if name in costs else _ALIGNMENT
            start = _rounded_up(end, unit)
            places[name] = Span(start, start + prod(shape))
            end = _rounded_up(places[name].stop, unit)
            if name in costs:
                whole[name] = WholeMatrix(Span(start, end), costs[name])
            if len(shape) >= 2:
                boundary = end
        return cls(places, boundary, _rounded_up(end, BLOCK), whole)

    @cached_property
    def whole(self) -> PackedSpans:
        return PackedSpans([Span(0, self.size)])

    @cached_property
    def in_matrices(self) -> PackedSpans:
        """The blocks of the matrices that no part cuts."""
        return PackedSpans([matrix.blocks for matrix in self.matrices.values()])

    @cached_property
    def outside_matrices(self) -> PackedSpans:
        """All other blocks."""
        if not self.matrices:
            return self.whole
        outside: list[Span] = []
        end = 0
        for blocks in self.in_matrices.spans:
            outside.append(Span(end, blocks.start))
            end = blocks.stop
        outside.append(Span(end, self.size))
        return PackedSpans([span for span in outside if not span.is_empty])

    @cached_property
    def decoder_blocks(self) -> list[Span]:
        """The place of each decoder block's matrices, which lie end to end."""
        matrices: dict[int, list[Span]] = {}
        for name, place in self.places.items():
            match = _OF_BLOCK.match(name)
            if match and place.stop <= self.boundary:
                whole = self.matrices.get(name)
                matrices.setdefault(int(match[1]), []).append(whole.blocks if whole else place)
        blocks: list[Span] = []
        for number in sorted(matrices):
            places = matrices[number]
            blocks.append(Span(places[0].start, places[-1].stop))
        return blocks

    @cached_property
    def buckets(self) -> list[Span]:
        """Stretches of whole blocks of values, which begin where a block of the decoder does, or
        just before."""
        cuts = {0, self.size}
        for block in self.decoder_blocks:
            cuts.add(block.start - block.start % BLOCK)
            cuts.add(block.stop - block.stop % BLOCK)
        for span in self.outside_matrices.spans:
            cuts |= {span.start, span.stop}
        buckets: list[Span] = []
        for start, stop in pairwise(sorted(cuts)):
            matrices = self._matrices_in(Span(start, stop))
            if matrices:
                buckets += buckets_of_matrices(matrices, most_values=_MAX_BUCKET)
            else:
                buckets += _buckets_between(start, stop)
        return buckets

    def parts(self, rank: int, *, world_size: int) -> PackedSpans:
        """Returns the rank's part of each bucket, in the order of buckets; a part may be empty."""
        if not self.matrices:  # a planner's buckets are thousands, each with a part of every rank
            parts = [part_of(bucket, rank, world_size=world_size) for bucket in self.buckets]
            return PackedSpans(parts)
        return PackedSpans([parts[rank] for parts in self.divided(world_size)])

    def divided(self, world_size: int) -> Sequence[Sequence[Span]]:
        """Returns each bucket's parts, by rank."""
        if world_size not in self._divisions:
            self._divisions[world_size] = self._divided(world_size)
        return self._divisions[world_size]

    def parts_of_owners(
        self, owners: Sequence[int], *, numbers: range | None = None
    ) -> Sequence[Sequence[Span]]:
        """Returns each bucket's parts in the order of their owners' numbers: of the buckets of
        these numbers, or of all."""
        numbers = numbers or range(len(self.buckets))
        parts_of_buckets: list[list[Span]] = []
        for parts in self.divided(len(owners))[numbers.start : numbers.stop]:
            parts_of_buckets.append([parts[owner] for owner in owners])
        return parts_of_buckets

    @cached_property
    def _divisions(self) -> dict[int, Sequence[Sequence[Span]]]:
        """By world size, as there are hundreds of ways to divide a bucket of matrices."""
        return {}

    def _divided(self, world_size: int) -> Sequence[Sequence[Span]]:
        costs = [0.0] * world_size  # of what each rank has so far
        divided: list[Sequence[Span]] = []
        for bucket in self.buckets:
            matrices = self._matrices_in(bucket)
            if matrices:
                divided.append(parts_of_matrices(matrices, costs))
            else:
                divided.append(parts_of(bucket, world_size=world_size))
        return divided

    def _matrices_in(self, span: Span) -> list[WholeMatrix]:
        return [matrix for matrix in self.matrices.values() if matrix.blocks.meets(span)]

    def stretches(self, span: Span) -> Iterator[tuple[str | None, Span]]:
        """Yields the places in a span that are updated together: of each matrix that no part cuts,
        with its name, and of the values between them."""
        start = span.start
        for name, matrix in self.matrices.items():
            if not matrix.blocks.meets(span):
                continue
            if start < matrix.blocks.start:
                yield None, Span(start, matrix.blocks.start)
            yield name, self.places[name]
            start = matrix.blocks.stop
        if start < span.stop:
            yield None, Span(start, span.stop)

    def pieces(self, spans: PackedSpans) -> Iterator[tuple[str, Span, Span]]:
        """Yields the stretches of parameters in some spans: the parameter's name, the place in the
        parameter, and the place in the packed values of the spans."""
        names = [*self.places]
        parameters = PackedSpans([*self.places.values()])
        starts = [home.start for home in parameters.homes]
        for in_parameters, in_spans in parameters.overlaps(spans):
            number = bisect_right(starts, in_parameters.start) - 1
            yield names[number], in_parameters.shifted(-starts[number]), in_spans

    def view(self, flat: "Tensor", name: str, parameter: "Tensor") -> "Tensor":
        return self.places[name].of(flat).view(parameter.shape)


def part_of(bucket: Span, rank: int, *, world_size: int) -> Span:
    """Returns the rank's blocks of the bucket: the ranks' parts differ by one block at most."""
    num_blocks = len(bucket) // BLOCK
    first = rank * num_blocks // world_size
    end = (rank + 1) * num_blocks // world_size
    return Span(bucket.start + first * BLOCK, bucket.start + end * BLOCK)


def parts_of(bucket: Span, *, world_size: int) -> list[Span]:
    """Returns the part of each rank."""
    return [part_of(bucket, rank, world_size=world_size) for rank in range(world_size)]


def _buckets_between(start: int, stop: int) -> list[Span]:
    num_buckets = _ratio_up(stop - start, _MAX_BUCKET)
    size = _ratio_up(stop - start, num_buckets)
    size = _rounded_up(size, _BUCKET_UNIT)
    buckets: list[Span] = []
    for first in range(start, stop, size):
        end = min(first + size, stop)
        buckets.append(Span(first, end))
    return buckets


def _ratio_up(number: int, unit: int) -> int:
    return -(-number // unit)


def _rounded_up(number: int, unit: int) -> int:
    return _ratio_up(number, unit) * unit
