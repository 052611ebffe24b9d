"""Finishes sums of gradients among peers by halving: in each message a peer sends half of its
values, and adds the half that it gets to the other half.

Who swaps with whom is decided by `teams`, and where halves lie by `state/division`. Every message and
addition is in place, in the buffers that have the subtrees' sums.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raymill.state.division import Division, Piece, owners
from raymill.state.peers import Peers, Tensors
from raymill.state.span import Span
from raymill.sums.exact_reduce import tree_sum
from raymill.sums.teams import Swap, Team, TeamPlan

Seen = Callable[[range, Span, Tensor], None]
"""Gets the lanes of a sum, and where it now is in a vector."""


class Room:
    """Memory for what arrives, which grows to the most that is needed at a time and stays."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, device=device)

    def views(self, lengths: Sequence[int]) -> list[Tensor]:
        """Returns vectors of these lengths, until the next ones are asked for."""
        size = sum(lengths)
        if size > len(self._memory):
            self._memory = self._memory.new_empty(size)
        return list(self._memory[:size].split(list(lengths)))


class HalvedSums:
    """The sums of a step's roots as one of the peers makes them."""

    def __init__(self, peers: Peers, plan: TeamPlan, room: Room) -> None:
        self._peers = peers
        self._plan = plan
        self._room = room
        self._levels = plan.swaps(peers.index)
        self._unfinished = plan.unfinished

    def finish(
        self, vectors: Sequence[Tensor], division: Division, seen: Seen | None = None
    ) -> None:
        """Puts this peer's part of the k-th root's sum into the k-th of `vectors`.

        The vectors are one bucket of the buffers (n,): the first of them have the sums of this
        peer's subtrees, which are used up. Each sum that this peer makes can be seen.
        """
        for swaps in self._levels:
            self._swap(swaps, vectors, division, seen)
        if self._unfinished:
            self._finish_at_owners(vectors, division, seen)

    def _swap(
        self,
        swaps: Sequence[Swap],
        vectors: Sequence[Tensor],
        division: Division,
        seen: Seen | None,
    ) -> None:
        kept = [division.piece(swap.kept).of(vectors[swap.buffer]) for swap in swaps]
        arriving = self._room.views([len(half) for half in kept])
        sent: list[Tensors] = []
        received: list[Tensors] = []
        for swap, half in zip(swaps, arriving, strict=True):
            sent.append((swap.partner, [division.piece(swap.sent).of(vectors[swap.buffer])]))
            received.append((swap.partner, [half]))
        self._peers.pass_on(sent, received)
        for swap, half, other in zip(swaps, kept, arriving, strict=True):
            half.add_(other)
            if seen:
                seen(swap.node, division.piece(swap.kept), vectors[swap.buffer])

    def _finish_at_owners(
        self, vectors: Sequence[Tensor], division: Division, seen: Seen | None
    ) -> None:
        """Sends the owner of each part what the teams have of it, and adds up this peer's part."""
        teams: list[Team] = []
        for root in self._unfinished.values():
            teams += self._plan.left_over[root]
        own_part = division.part(self._peers.index)
        rows = self._room.views([len(own_part)] * len(teams))
        sent: list[Tensors] = []
        received: list[Tensors] = []
        for team, row in zip(teams, rows, strict=True):
            for number, member in enumerate(team.members):
                piece = team.piece(number)
                overlap = division.piece(piece) & own_part
                if not overlap.is_empty:
                    target = overlap.shifted(-own_part.start).of(row)
                    received.append((member.peer, [target]))
                if member.peer == self._peers.index:
                    sent += self._to_owners(vectors[member.buffer], piece, division)
        self._peers.pass_on(sent, received)
        by_node = {team.node: row for team, row in zip(teams, rows, strict=True)}
        for number, root in self._unfinished.items():
            own_part.of(vectors[number]).copy_(tree_sum(root, by_node.get))
            if seen:
                seen(root, own_part, vectors[number])

    def _to_owners(self, vector: Tensor, piece: Piece, division: Division) -> list[Tensors]:
        messages: list[Tensors] = []
        for peer, _ in owners(piece, division.num_peers):
            overlap = division.piece(piece) & division.part(peer)
            if not overlap.is_empty:
                messages.append((peer, [overlap.of(vector)]))
        return messages
