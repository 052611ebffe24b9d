"""Divides neighboring values among peers, so that a team of them can halve what it has again and
again.

Two peers that halve some values keep one half each; then each halves its own with another peer, and
so on. Nearest peers begin, as they lie on one node and the first halves are the longest. So it goes
among eight, from left to right the values of a bucket:

    peer    after one halving    after two    after three
    0       ####----             ##------     #-------
    1       ----####             ----##--     ----#---
    2       ####----             --##----     --#-----
    3       ----####             ------##     ------#-
    4       ####----             ##------     -#------
    …

A stretch that one of m peers has is a *piece*, the j-th of m. What a peer has in the end is its
*part*. The parts of eight lie in the order 0 4 2 6 1 5 3 7: by the number of the peer, with its
bits read backwards. That order serves any number of peers: the part of each lies within the pieces
that it comes by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from raymill.state.flat_layout import BLOCK, parts_of
from raymill.state.span import Span


def seats_of(nodes: Sequence[object]) -> list[int]:
    """Returns the peers in an order in which neighbors that halve are on one node; `nodes` has the
    node of each.

    Of each node eight peers sit first, or four, or whichever power of two it has: so they begin at
    a multiple of their number. The others follow, the longest such rows first.

        nodes    a a a b b b        peers 0 to 5
        seats    0 1 | 3 4 | 2 | 5
    """
    peers_of_nodes: dict[object, list[int]] = {}
    for peer, node in enumerate(nodes):
        peers_of_nodes.setdefault(node, []).append(peer)
    rows: list[list[int]] = []
    for peers in peers_of_nodes.values():
        for team in power_of_two_teams(len(peers)):
            rows.append([peers[place] for place in team])
    rows.sort(key=len, reverse=True)
    return list(chain.from_iterable(rows))


@lru_cache(maxsize=64)
def power_of_two_teams(num_peers: int) -> Sequence[range]:
    """Returns teams of neighboring peers, the largest first, whose sizes are powers of two."""
    teams: list[range] = []
    start = 0
    while start < num_peers:
        size = 1 << (num_peers - start).bit_length() - 1
        teams.append(range(start, start + size))
        start += size
    return teams


@dataclass(frozen=True, slots=True)
class Piece:
    """One of `count` stretches of a bucket, about equally long."""

    number: int
    count: int

    @property
    def halves(self) -> tuple["Piece", "Piece"]:
        count = 2 * self.count
        return Piece(2 * self.number, count), Piece(2 * self.number + 1, count)


def reversed_bits(number: int, *, size: int) -> int:
    """Returns a number below `size`, a power of two, with its bits read backwards."""
    reverse = 0
    for _ in range((size - 1).bit_length()):
        reverse = 2 * reverse + number % 2
        number //= 2
    return reverse


@lru_cache(maxsize=64)
def order_of_parts(num_peers: int) -> Sequence[int]:
    """Returns the peers in the order in which their parts lie."""
    size = 1 << (num_peers - 1).bit_length()
    return sorted(range(num_peers), key=lambda peer: reversed_bits(peer, size=size))


def owners(piece: Piece, num_peers: int) -> list[tuple[int, float]]:
    """Returns the peers that have a part of a piece, and the share of the bucket that it is."""
    shares: list[tuple[int, float]] = []
    place = piece.number * num_peers // piece.count
    while place * piece.count < (piece.number + 1) * num_peers:
        start = max(piece.number * num_peers, place * piece.count)
        stop = min((piece.number + 1) * num_peers, (place + 1) * piece.count)
        share = (stop - start) / (num_peers * piece.count)
        shares.append((order_of_parts(num_peers)[place], share))
        place += 1
    return shares


@dataclass(frozen=True)
class Division:
    """The parts of neighboring values, of which each peer has one; places count from the first
    value."""

    order: Sequence[int]  # the peers in the order of their parts
    bounds: Sequence[int]  # the first part's start and the end of each

    @classmethod
    def of(cls, num_values: int, *, num_peers: int) -> "Division":
        """Divides so many values, in whole blocks, into parts that differ by one block at most."""
        parts = parts_of(Span(0, num_values), world_size=num_peers)
        return cls(order_of_parts(num_peers), [0, *(part.stop for part in parts)])

    @property
    def num_peers(self) -> int:
        return len(self.order)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {peer: place for place, peer in enumerate(self.order)}

    def part(self, peer: int) -> Span:
        place = self._places[peer]
        return Span(self.bounds[place], self.bounds[place + 1])

    def piece(self, piece: Piece) -> Span:
        """Returns a piece, which ends where a part does if as many parts are in each."""
        start = self._cut(piece.number, piece.count)
        stop = self._cut(piece.number + 1, piece.count)
        return Span(start, stop)

    def _cut(self, number: int, count: int) -> int:
        """Returns the end of the first `number` of `count` pieces."""
        place, rest = divmod(number * self.num_peers, count)
        if not rest:
            return self.bounds[place]
        start = self.bounds[place]
        num_blocks = (self.bounds[place + 1] - start) // BLOCK
        return start + rest * num_blocks // count * BLOCK
