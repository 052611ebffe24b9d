"""Lays out the parameters in flat buffers, and cuts these into buckets, parts and blocks.

Matrices come first, then the biases and LayerNorms, which have no decay, each in the order in which backward finishes
their gradients. A bucket is exchanged as soon as backward is done with it. Every rank owns a part of each bucket, in
whole blocks. Blocks do not depend on the world size: the gradient's norm is summed over them.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 1024  # values in a block

PIECE_VALUES = 16 << 20  # copied at a time from a GPU: 64 MiB of fp32, twice in pinned memory

NUM_SENDINGS = 8  # stretches of an update that is sent: one is on its way while the next is computed

# Parameters start at multiples of 64 bytes, as torch's own allocations do: vector kernels may round differently on
# other alignments.
_ALIGNMENT = 16

_BUCKET_UNIT = 16 * BLOCK  # worlds of up to 16 ranks, if a power of two, divide a bucket evenly
_OF_BLOCK = re.compile(r"\D*\.(\d+)\.")  # in any architecture, the first number in a name is its block's
_MAX_BUCKET = 384 * _BUCKET_UNIT  # 25 MB of fp32, as DistributedDataParallel's


@dataclass(frozen=True)
class FlatLayout:
    """Places in units of values."""

    places: dict[str, range]  # by parameter
    boundary: int  # values with decay lie before it
    size: int  # P, in whole blocks

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> "FlatLayout":
        """Lays out parameters by name and shape, given in the model's order (`model.shapes.parameter_shapes`)."""
        # Matrices and embeddings decay; biases and LayerNorms, which are vectors, do not (GPT-3, appendix B).
        backward_order = [*shapes.items()][::-1]
        places: dict[str, range] = {}
        end, boundary = 0, 0
        for name, shape in sorted(backward_order, key=lambda item: len(item[1]) < 2):
            places[name] = range(end, end + prod(shape))
            end += _rounded(prod(shape), _ALIGNMENT)
            boundary = end if len(shape) >= 2 else boundary
        return cls(places, boundary, _rounded(end, BLOCK))

    @cached_property
    def decoder_blocks(self) -> list[range]:
        """The places of the matrices of each block of the decoder, which lie end to end."""
        found: dict[int, list[range]] = {}
        for name, place in self.places.items():
            if (match := _OF_BLOCK.match(name)) and place.stop <= self.boundary:
                found.setdefault(int(match[1]), []).append(place)
        return [range(found[n][0].start, found[n][-1].stop) for n in sorted(found)]

    @cached_property
    def buckets(self) -> list[range]:
        """Stretches of whole blocks of values, which begin where a block of the decoder does, or just before."""
        ends = [end for span in self.decoder_blocks for end in (span.start, span.stop)]
        cuts = sorted({0, self.size, *(end - end % BLOCK for end in ends)})
        found = []
        for start, stop in pairwise(cuts):
            num_buckets = -(-(stop - start) // _MAX_BUCKET)
            size = _rounded(-(-(stop - start) // num_buckets), _BUCKET_UNIT)
            found += [range(first, min(first + size, stop)) for first in range(start, stop, size)]
        return found

    def parts(self, rank: int, *, world_size: int) -> list[range]:
        """Returns the rank's part of each bucket, in the order of buckets; a part may be empty."""
        return [part_of(bucket, rank, world_size=world_size) for bucket in self.buckets]

    def pieces(self, places: Sequence[range]) -> Iterator[tuple[str, range, range]]:
        """Yields the stretches of parameters at the places, which are in order: a parameter's name, where the stretch
        is in the parameter, and where it is in the places' values, end to end."""
        names, starts = [*self.places], [own.start for own in end_to_end(self.places.values())]
        for of_all, own in stretches([*self.places.values()], places):
            number = bisect_right(starts, of_all.start) - 1
            yield names[number], moved(of_all, starts[number]), own

    def view(self, flat: "Tensor", name: str, parameter: "nn.Parameter") -> "Tensor":
        return at(flat, self.places[name]).view(parameter.shape)


def part_of(bucket: range, rank: int, *, world_size: int) -> range:
    """Returns the rank's blocks of the bucket: the ranks' parts differ by one block at most."""
    num_blocks = len(bucket) // BLOCK
    first, end = (rank * num_blocks // world_size, (rank + 1) * num_blocks // world_size)
    return range(bucket.start + first * BLOCK, bucket.start + end * BLOCK)


def shared(a: range, b: range) -> range:
    """Returns the places that lie in both."""
    return range(max(a.start, b.start), min(a.stop, b.stop))


def moved(place: range, start: int, to: int = 0) -> range:
    """Returns the place in a buffer that has at `to` what this one has at `start`."""
    return range(place.start - start + to, place.stop - start + to)


def at(flat: "Tensor", place: range) -> "Tensor":
    """Returns the view of a flat buffer (P,) at a place."""
    return flat[place.start : place.stop]


def end_to_end(places: Iterable[range]) -> list[range]:
    """Returns where the values of each place are, if those of all lie end to end."""
    ends = list(accumulate(map(len, places), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def within(places: Sequence[range], span: range) -> list[range]:
    """Returns the places of the values that are at `span` if all lie end to end."""
    cuts = ((place, own.start, shared(own, span)) for place, own in zip(places, end_to_end(places), strict=True))
    return [moved(cut, start, place.start) for place, start, cut in cuts if cut]


def stretches(a: Sequence[range], b: Sequence[range]) -> Iterator[tuple[range, range]]:
    """Yields where each stretch that both have is in a's and in b's values, end to end. Both are in order."""
    i = j = 0
    own_a, own_b = end_to_end(a), end_to_end(b)
    while i < len(a) and j < len(b):
        if both := shared(a[i], b[j]):
            yield moved(both, a[i].start, own_a[i].start), moved(both, b[j].start, own_b[j].start)
        i, j = (i + 1, j) if a[i].stop <= b[j].stop else (i, j + 1)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit
