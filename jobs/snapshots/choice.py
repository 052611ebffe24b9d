"""Chooses the snapshot that a new attempt continues from, and the snapshots that need a second node: pure decisions."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_SHARE = 0.01  # of a step's time that snapshots may cost
COPIES = "copy-"  # begins the name of an area of copies


@dataclass(frozen=True)
class Holding:
    """One rank's share of the state after a step, in the memory of a node."""

    node: str
    area: str  # the name of the memory on its node
    slot: int
    sequence: int
    attempt: int
    step: int
    rank: int
    world_size: int  # number of shares; 1 where this is the whole state


@dataclass(frozen=True)
class Choice:
    """A state whose every share is held."""

    step: int
    holders: list[list[Holding]]  # the holdings of each share, by rank


@dataclass(frozen=True)
class Source:
    """The rank that brings a share into the new group."""

    reader: int
    holding: Holding
    is_local: bool  # whether it lies in the memory of the reader's own node


def choose(
    holdings: Iterable[Holding], *, explained_step: int, at_least: int, is_left_out: Callable[[int], bool]
) -> Choice | None:
    """Returns the newest complete state, or None when the checkpoint of step `at_least` is newer.

    `explained_step` is the ledger's last step, which a state must not be ahead of. `is_left_out` reports the steps
    whose updates a rollback took back.
    """
    states: dict[tuple[int, int, int], dict[int, list[Holding]]] = {}
    for held in holdings:
        if at_least <= held.step <= explained_step and not is_left_out(held.step):
            shares = states.setdefault((held.step, held.attempt, held.world_size), {})
            shares.setdefault(held.rank, []).append(held)
    complete = {key: shares for key, shares in states.items() if len(shares) == key[2]}
    if not complete:
        return None
    newest = max(complete)
    return Choice(newest[0], [complete[newest][rank] for rank in range(newest[2])])


def sources(choice: Choice, node_of_rank: Sequence[str]) -> list[Source]:
    """Returns the source of each share: the first rank whose node holds it, or else rank 0, from another node."""
    found = []
    for holders in choice.holders:
        by_node = {held.node: held for held in holders}
        local = [rank for rank, node in enumerate(node_of_rank) if node in by_node]
        if local:
            found.append(Source(local[0], by_node[node_of_rank[local[0]]], is_local=True))
        else:
            found.append(Source(0, holders[0], is_local=False))
    return found


def held_on(choice: Choice, node: str) -> list[Holding] | None:
    """Returns every share, if the node holds them all."""
    shares = [next((held for held in holders if held.node == node), None) for holders in choice.holders]
    return None if None in shares else [share for share in shares if share is not None]


def copies(holdings: Iterable[Holding], nodes: Sequence[str]) -> list[tuple[Holding, str]]:
    """Returns what to copy to which node, so that each rank's newest share is also on the node with the fewest."""
    newest: dict[tuple[int, int], Holding] = {}
    holders: dict[tuple[int, int], set[str]] = {}
    held = list(holdings)
    attempt = max((share.attempt for share in held), default=0)
    for share in held:
        key = (share.rank, share.world_size)
        if share.attempt == attempt and not share.area.startswith(COPIES):
            holders.setdefault(key, set()).add(share.node)
            if key not in newest or share.step > newest[key].step:
                newest[key] = share
    load = {node: sum(share.node == node for share in held) for node in nodes}
    wanted = []
    for key, share in sorted(newest.items()):
        others = [node for node in nodes if node != share.node]
        if len(holders[key]) > 1 or not others:
            continue
        having = {copy.node for copy in held if copy.area == copy_area(share)}
        target = min(others, key=lambda node: (node not in having, load[node], node))
        wanted.append((share, target))
        load[target] += 1
    return wanted


def copy_area(share: Holding) -> str:
    """Returns the name of the memory on another node that holds copies of the share."""
    return f"{COPIES}{share.area}"


def interval(*, copy_s: float, step_s: float) -> int:
    """Returns the number of steps between snapshots that keeps their cost below `MAX_SHARE`."""
    return max(1, math.ceil(copy_s / (MAX_SHARE * step_s)))
