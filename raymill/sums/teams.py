"""Decides which peers finish the sum's tree together, and who swaps halves with whom on the way.

The tree is binary, so two siblings are a pairing: whoever has the left sum and whoever has the
right one swap halves, and each adds what it got to the half that it kept. Together they then have
the sum of the parent, as a team of two. Two teams of equal size, whose nodes are siblings, pair
alike: the j-th member of one with the j-th of the other.

    lanes           0-7     8-15    16-23   24-31   32-39   40-47
    peers           0       1       2       3       4       5
    1st pairings    0-15: peers 0, 1        16-31: 2, 3     32-47: 4, 5
    2nd             0-31: peers 0, 2, 1, 3, a quarter each

What every pairing adds is a node of the tree, so the bits are those of the tree. With a power of
two of peers the last pairing is the root's, and that is all: log2 of their number in messages, and
as many bytes as a ring sends. Else some teams are left, here one of four and one of two: their
members send the owner of each part what they have of it, and the owner adds up the rest of the
tree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from raymill.state.division import Piece, order_of_parts, owners
from raymill.state.messages import Message, most_cost
from raymill.sums.exact_reduce import halves


class Member(NamedTuple):
    """A peer, and which of its buffers has its piece of the team's sum."""

    peer: int
    buffer: int


@dataclass(frozen=True)
class Team:
    """Peers that have the sum of a node together: the j-th of m members has the j-th of m
    pieces."""

    node: range
    members: Sequence[Member]

    def piece(self, number: int) -> Piece:
        return Piece(number, len(self.members))


@dataclass(frozen=True)
class Swap:
    """One member's work in a pairing."""

    buffer: int
    partner: int
    kept: Piece
    sent: Piece
    node: range  # whose sum the kept piece has then


@dataclass
class TeamPlan:
    """The pairings of a step, and the teams that are left after them."""

    num_peers: int
    levels: list[list[tuple[Team, Team]]] = field(default_factory=list)
    """Pairings of teams of one, then of two, then of four: the left team and the right one."""
    left_over: dict[range, list[Team]] = field(default_factory=dict)
    """By root: the teams that have its sum. If that is one team of all peers, each has its part."""

    def messages(self) -> Iterator[Message]:
        """Yields the messages by which a bucket's sums are finished."""
        for pairings in self.levels:
            for left, right in pairings:
                share = 0.5 / len(left.members)
                for one, other in zip(left.members, right.members, strict=True):
                    yield Message(one.peer, other.peer, share)
                    yield Message(other.peer, one.peer, share)
        for root in self.unfinished.values():
            for team in self.left_over[root]:
                for number, member in enumerate(team.members):
                    for owner, share in owners(team.piece(number), self.num_peers):
                        if owner != member.peer:
                            yield Message(member.peer, owner, share)

    def swaps(self, peer: int) -> list[list[Swap]]:
        """Returns what a peer does at each level; at some it may do nothing."""
        levels: list[list[Swap]] = []
        for pairings in self.levels:
            swaps: list[Swap] = []
            for left, right in pairings:
                swaps += _swaps_of(peer, left, right)
            levels.append(swaps)
        return levels

    def add_pairing(self, node: range, left: Team, right: Team) -> Team:
        """Returns the team of both, which then has the sum of their parent."""
        number = len(left.members).bit_length() - 1
        while len(self.levels) <= number:
            self.levels.append([])
        self.levels[number].append((left, right))
        members: list[Member] = []
        for pair in zip(left.members, right.members, strict=True):
            members += pair
        return Team(node, members)

    @cached_property
    def unfinished(self) -> dict[int, range]:
        """By their numbers, the roots whose sums the owners of the parts have to finish: all roots
        but the ones of which each peer has its part, in the buffer of the root's number."""
        roots: dict[int, range] = {}
        for number, (root, teams) in enumerate(self.left_over.items()):
            finished = [Member(peer, number) for peer in order_of_parts(self.num_peers)]
            if [team.members for team in teams] != [finished]:
                roots[number] = root
        return roots


def team_plan(roots: Sequence[range], subtrees: Sequence[Sequence[range]]) -> TeamPlan:
    """Plans the sums of some nodes of the tree, whose subtrees are on the peers: the k-th of a peer
    in its k-th buffer. Where pairings would take longer, as they may for a few peers, there are
    none: all teams have one member."""
    paired = _planned(roots, subtrees, can_pair=_can_pair)
    if not paired.unfinished:
        return paired
    apart = plan_without_pairings(roots, subtrees)
    return min(paired, apart, key=lambda plan: most_cost(plan.messages(), plan.num_peers))


def plan_without_pairings(roots: Sequence[range], subtrees: Sequence[Sequence[range]]) -> TeamPlan:
    """Plans that each peer sends all owners of parts what it has."""
    return _planned(roots, subtrees, can_pair=lambda left, right: False)


def _planned(
    roots: Sequence[range],
    subtrees: Sequence[Sequence[range]],
    *,
    can_pair: Callable[[Team, Team], bool],
) -> TeamPlan:
    plan = TeamPlan(num_peers=len(subtrees))
    teams: dict[range, Team] = {}
    for peer, nodes in enumerate(subtrees):
        for buffer, node in enumerate(nodes):
            teams[node] = Team(node, [Member(peer, buffer)])

    def pair_below(node: range, left_over: list[Team]) -> Team | None:
        """Returns the team that has a node's sum after all pairings below it; if there is none, its
        children's teams are left over."""
        if node in teams:
            return teams[node]
        children = [pair_below(half, left_over) for half in halves(node)]
        left, right = children
        if left is None or right is None or not can_pair(left, right):
            left_over += [team for team in children if team is not None]
            return None
        return plan.add_pairing(node, left, right)

    for root in roots:
        left_over: list[Team] = []
        team = pair_below(root, left_over)
        plan.left_over[root] = left_over if team is None else [team]
    return plan


def _can_pair(left: Team, right: Team) -> bool:
    if len(left.members) != len(right.members):
        return False
    left_peers = {member.peer for member in left.members}
    return all(member.peer not in left_peers for member in right.members)


def _swaps_of(peer: int, left: Team, right: Team) -> list[Swap]:
    """Returns what the peer does when two teams pair, which is nothing if it is in neither."""
    swaps: list[Swap] = []
    pairs = zip(left.members, right.members, strict=True)
    for number, (left_member, right_member) in enumerate(pairs):
        first, second = left.piece(number).halves
        node = range(left.node.start, right.node.stop)
        if peer == left_member.peer:
            swap = Swap(left_member.buffer, right_member.peer, first, second, node)
            swaps.append(swap)
        elif peer == right_member.peer:
            swap = Swap(right_member.buffer, left_member.peer, second, first, node)
            swaps.append(swap)
    return swaps
