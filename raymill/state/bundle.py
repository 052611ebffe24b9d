"""Joins neighboring buckets that are exchanged together, and brings their parts into the order of
halving.

Buckets are joined where their messages would be too short (`messages`). Where nobody must own a
certain part, parts are cut so that they lie in the right order (`division`). With a sharded
optimizer the n-th rank owns the n-th part of each bucket, for which it keeps the rule's vectors.
These parts are packed for the exchange:

    two buckets of four ranks   0 1 2 3 | 0 1 2 3
    packed                      00 22 11 33
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from raymill.state.division import Division, order_of_parts
from raymill.state.doubling import gather, teams_to_gather
from raymill.state.flat_layout import BLOCK
from raymill.state.messages import joined_buckets
from raymill.state.peers import Peers
from raymill.state.span import Span


class Bundle:
    """Neighboring buckets of flat buffers, with the parts that peers have of them."""

    def __init__(
        self, buckets: Sequence[Span], num_peers: int, *, parts: Sequence[Sequence[Span]] | None
    ) -> None:
        """`parts` has the part of each bucket that each peer must have; without them, a peer has
        any part of all together."""
        self.num_buckets = len(buckets)
        self.span = Span(buckets[0].start, buckets[-1].stop)
        if parts is None:
            self.division = Division.of(len(self.span), num_peers=num_peers)
            self._parts = [
                [self.division.part(peer).shifted(self.span.start)] for peer in range(num_peers)
            ]
            self._is_in_order = True
            return
        self._parts = [[*parts_of_peer] for parts_of_peer in zip(*parts, strict=True)]
        order = order_of_parts(num_peers)
        bounds = [0]
        packed: list[Span] = []
        for peer in order:
            packed += self._parts[peer]
            bounds.append(bounds[-1] + sum(map(len, self._parts[peer])))
        self.division = Division(order, bounds)
        self._is_in_order = all(part.stop == after.start for part, after in pairwise(packed))

    def parts(self, peer: int) -> list[Span]:
        """Returns the places of a peer's values in a flat buffer, in order."""
        return self._parts[peer]

    def packed_places(self, span: Span) -> Iterator[tuple[Span, Span]]:
        """Yields where values lie in a flat buffer, and where among the packed ones: the values of
        a span of whole blocks that lie in these buckets."""
        overlap = self.span & span
        if self._is_in_order and not overlap.is_empty:
            yield overlap, overlap.shifted(-self.span.start)
        if self._is_in_order:
            return
        for start in range(overlap.start, overlap.stop, BLOCK):
            number = (start - self.span.start) // BLOCK
            packed_start = int(self._places[number]) * BLOCK
            yield Span(start, start + BLOCK), Span(packed_start, packed_start + BLOCK)

    def packed(self, flat: Tensor) -> Tensor:
        """Returns the values in a flat buffer with the parts in order: a view, if they lie so."""
        values = self.span.of(flat)
        if self._is_in_order:
            return values
        blocks = self._blocks.to(flat.device)
        return values.view(-1, BLOCK).index_select(0, blocks).flatten()

    def unpack_part(self, packed: Tensor, flat: Tensor, peer: int) -> None:
        """Puts a peer's part of the packed values to its places in a flat buffer."""
        if self._is_in_order:
            return
        part = self.division.part(peer).of(packed)
        places = [place.of(flat) for place in self._parts[peer]]
        for place, values in zip(places, part.split([*map(len, places)]), strict=True):
            place.copy_(values)

    def gather(self, peers: Peers, flat: Tensor, *, tag: int = 0) -> None:
        """Completes the values in a flat buffer, of which each peer has its own part."""
        teams = teams_to_gather(len(peers))
        if self._is_in_order:
            gather(peers, self.span.of(flat), self.division, teams, tag=tag)
            return
        packed = flat.new_empty(len(self.span))
        own_values = [part.of(flat) for part in self._parts[peers.index]]
        torch.cat(own_values, out=self.division.part(peers.index).of(packed))
        gather(peers, packed, self.division, teams, tag=tag)
        places = self._places.to(flat.device)
        rows = self.span.of(flat).view(-1, BLOCK)
        torch.index_select(packed.view(-1, BLOCK), 0, places, out=rows)

    @cached_property
    def _blocks(self) -> Tensor:
        """The number of each packed block in the buckets."""
        blocks: list[Tensor] = []
        for peer in self.division.order:
            for part in self._parts[peer]:
                in_span = part.shifted(-self.span.start)
                blocks.append(torch.arange(in_span.start // BLOCK, in_span.stop // BLOCK))
        return torch.cat(blocks)

    @cached_property
    def _places(self) -> Tensor:
        """The packed place of each block of the buckets."""
        return self._blocks.argsort()


def bundles_of(
    buckets: Sequence[Span], num_peers: int, *, parts: Sequence[Sequence[Span]] | None
) -> list[Bundle]:
    """Returns bundles of all buckets; `parts` has the part of each that each peer must have."""
    bundles: list[Bundle] = []
    start = 0
    for joined in joined_buckets(buckets, num_peers):
        stop = start + len(joined)
        bundle = Bundle(joined, num_peers, parts=parts[start:stop] if parts else None)
        bundles.append(bundle)
        start = stop
    return bundles
