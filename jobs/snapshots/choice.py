"""Chooses the snapshot that a new attempt continues from, and the snapshots that need a second
node: pure decisions."""

import math
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from jobs.snapshots.slots import NUM_SLOTS, Header

MAX_SHARE = 0.01  # of a step's time that snapshots may cost
# Begins the name of an area with copies of a share, before the name of the share's own
COPIES = "copy-"
ONLY = "only-"  # begins the name of an area where the node has a part of the state alone


@dataclass(frozen=True)
class Holding:
    """A share of the state after a step, in the memory of a node."""

    node: str
    area: str  # the name of the memory on its node
    slot: int
    header: Header


@dataclass(frozen=True)
class Snapshot:
    """A state whose every share is held."""

    shares: list[list[Holding]]  # the holdings of each share, by rank

    @property
    def header(self) -> Header:
        """The header of one of the shares, which have the step and `carried` in common."""
        return self.shares[0][0].header


def choose(
    holdings: Iterable[Holding],
    *,
    explained_step: int,
    at_least: int,
    is_left_out: Callable[[int], bool],
    after_attempt: int = 0,
) -> Snapshot | None:
    """Returns the newest complete state, or None when the checkpoint of step `at_least` is newer.

    `explained_step` is the ledger's last step, which a state must not be ahead of. `is_left_out`
    reports the steps whose updates a rollback took back. States of attempts up to `after_attempt`
    are void.
    """
    states: dict[tuple[int, int, int], dict[int, list[Holding]]] = {}
    for held in holdings:
        head = held.header
        is_void = head.attempt <= after_attempt or is_left_out(head.step)
        if at_least <= head.step <= explained_step and not is_void:
            shares = states.setdefault((head.step, head.attempt, head.world_size), {})
            shares.setdefault(head.rank, []).append(held)
    complete = [key for key, shares in states.items() if len(shares) == key[2]]
    if not complete:
        return None
    newest = max(complete)
    _, _, world_size = newest
    return Snapshot([states[newest][rank] for rank in range(world_size)])


def contradictions(holdings: Iterable[Holding], *, after_attempt: int = 0) -> list[Holding]:
    """Returns the holdings of the newest share of which nodes hold other bits, though it is of the
    same step of the same attempt: a worker's state was wrong. None where all are alike, of attempts
    after this one."""
    shares: dict[tuple[int, int, int, int], list[Holding]] = {}
    for held in holdings:
        head = held.header
        if head.attempt > after_attempt:
            key = (head.step, head.attempt, head.world_size, head.rank)
            shares.setdefault(key, []).append(held)
    for key in sorted(shares, reverse=True):
        if len({held.header.checksum for held in shares[key]}) > 1:
            return shares[key]
    return []


def reader_of(holders: Container[str], node_of_rank: Sequence[str]) -> int | None:
    """Returns the rank that reads a share for all: the first whose node is a holder, or else rank
    0, from another node. None where every rank's own node is one."""
    local_ranks = [rank for rank, node in enumerate(node_of_rank) if node in holders]
    if len(local_ranks) == len(node_of_rank):
        return None
    return min(local_ranks, default=0)


def copies(holdings: Iterable[Holding], nodes: Sequence[str]) -> list[tuple[Holding, str]]:
    """Returns what to copy to which node, so that each share of the newest complete state of the
    newest attempt is also on the node with the fewest; nothing where two nodes write each share.
    One share alone would be of no use: the nodes that write the others are steps ahead when its
    node is lost."""
    holdings = list(holdings)
    attempt = max((held.header.attempt for held in holdings), default=0)
    written = []
    for held in holdings:
        if held.header.attempt == attempt and not held.area.startswith(COPIES):
            written.append(held)
    newest = choose(written, explained_step=sys.maxsize, at_least=0, is_left_out=lambda step: False)
    if newest is None or len(nodes) < 2:
        return []
    writers: dict[int, set[str]] = {}
    for held in written:
        writers.setdefault(held.header.rank, set()).add(held.node)
    shares = [min(holders, key=lambda held: held.area) for holders in newest.shares]
    if all(len(writers[share.header.rank]) > 1 for share in shares):
        return []
    load = dict.fromkeys(nodes, 0)
    for held in holdings:
        if held.node in load:
            load[held.node] += 1
    wanted = []
    for share in shares:
        with_copy = {held.node for held in holdings if held.area == COPIES + share.area}
        others = [node for node in nodes if node != share.node]
        target = min(others, key=lambda node: (node not in with_copy, load[node], node))
        wanted.append((share, target))
        load[target] += 1
    return wanted


def sharded_area(rank: int, group_size: int, node_of_rank: Sequence[str]) -> str:
    """Returns the name of the area for a rank's share of a state that each group of `group_size`
    ranks has in shards; a node may have several groups."""
    group, member = divmod(rank, group_size)
    num_nodes = [len({*node_of_rank[place::group_size]}) for place in range(group_size)]
    is_only = min(num_nodes) == 1 < len({*node_of_rank})
    return f"{ONLY * is_only}group-{group}-rank-{member}-of-{group_size}"


def num_slots(area: str) -> int:
    """Returns the number of an area's slots. Where each node has a part of the state alone, the
    loss of one leaves a whole state only of a step that all others keep too: the latest that was
    copied, in a third slot."""
    return NUM_SLOTS + area.startswith(ONLY)


def interval(*, copy_s: float, step_s: float) -> int:
    """Returns the number of steps between snapshots that keeps their cost below `MAX_SHARE`."""
    return max(1, math.ceil(copy_s / (MAX_SHARE * step_s)))
