"""Gathers a bucket from the peers that have its parts: what each has doubles with every message.

It is halving (`division`) backwards. With eight peers the parts lie in the order 0 4 2 6 1 5 3 7.
Peers at distance 4 give each other their parts, so both have a quarter. Peers at distance 2 give
each other quarters, and neighbors halves: three messages each, where a message to each other peer
would be seven.

Where the number of peers is no power of two, they form teams that are: twelve are a team of eight
and one of four. First each peer gives its part to those members, in every team, whose pieces it
lies in. Then each team doubles. A few peers take longer so than by giving their parts to all:
these are teams of one.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from raymill.state.division import Division, Piece, owners, power_of_two_teams, reversed_bits
from raymill.state.messages import Message, most_cost
from raymill.state.span import Span

if TYPE_CHECKING:  # the planner counts messages without PyTorch
    from torch import Tensor

    from raymill.state.peers import Peers, Tensors


def gather(
    peers: "Peers", values: "Tensor", division: Division, teams: Sequence[range], *, tag: int = 0
) -> None:
    """Completes the values of a bucket (n,), of which each peer has its own part. Messages that are
    sent beside others, from another thread, need a tag of their own."""
    own_team = next(team for team in teams if peers.index in team)
    if len(teams) > 1:
        _give_to_teams(peers, values, division, teams, tag=tag)
    count = len(teams[0])
    while count > 1:
        # Peers of smaller teams join in late, and count a message as the others do.
        sent: list[Tensors] = []
        received: list[Tensors] = []
        if count <= len(own_team):
            place = peers.index - own_team.start
            partner = place ^ (count // 2)
            number = own_team.start + partner
            sent = [(number, [division.piece(piece_of(place, count)).of(values)])]
            received = [(number, [division.piece(piece_of(partner, count)).of(values)])]
        peers.pass_on(sent, received, tag=tag)
        count //= 2


@lru_cache(maxsize=64)
def teams_to_gather(num_peers: int) -> Sequence[range]:
    """Returns the teams, the largest first, with which the parts are together soonest."""
    ways = [power_of_two_teams(num_peers)]
    if len(ways[0]) > 1:
        ways.append([range(peer, peer + 1) for peer in range(num_peers)])
    return min(ways, key=lambda teams: most_cost(gather_messages(num_peers, teams), num_peers))


def gather_messages(num_peers: int, teams: Sequence[range]) -> Iterator[Message]:
    """Yields the messages of a gather."""
    for team in teams:
        for peer in team:
            place = peer - team.start
            if len(teams) > 1:
                for owner, share in owners(piece_of(place, len(team)), num_peers):
                    if owner != peer:
                        yield Message(owner, peer, share)
            count = len(team)
            while count > 1:
                yield Message(peer, team.start + (place ^ (count // 2)), 1 / count)
                count //= 2


def piece_of(place: int, count: int) -> Piece:
    """Returns the piece of a member, given its place in the team, once `count` neighbors have met
    to halve."""
    return Piece(reversed_bits(place % count, size=count), count)


def _give_to_teams(
    peers: "Peers", values: "Tensor", division: Division, teams: Sequence[range], *, tag: int
) -> None:
    """Has each peer's part sent to the members of all teams whose pieces need it."""
    own_part = division.part(peers.index)
    own_piece = Span(0, 0)
    sent: list[Tensors] = []
    for peer, piece in _pieces(division, teams):
        overlap = piece & own_part
        if peer == peers.index:
            own_piece = piece
        elif not overlap.is_empty:
            sent.append((peer, [overlap.of(values)]))
    received: list[Tensors] = []
    for peer in range(len(peers)):
        overlap = division.part(peer) & own_piece
        if peer != peers.index and not overlap.is_empty:
            received.append((peer, [overlap.of(values)]))
    peers.pass_on(sent, received, tag=tag)


def _pieces(division: Division, teams: Sequence[range]) -> Iterator[tuple[int, Span]]:
    """Yields each peer with the piece that its team lets it have first."""
    for team in teams:
        for peer in team:
            yield peer, division.piece(piece_of(peer - team.start, len(team)))
