"""Checks the programs of all ranks of a world against one another: each message has its receiver, of
the same length and in the same order, and no rank waits for one that waits for it.

A call waits until each rank with which it exchanges has begun its own (a rendezvous): nothing is
taken to lie in a buffer until somebody asks for it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.jobs.ranks.program import Call, Event, Program

Ends = dict[tuple[int, int, int], list[tuple[int, int, str]]]
"""By sender, receiver and tag: the bytes of each message, the node of the call that has it, and what
it is part of."""


class Wire(Enum):
    """What carries messages, and so what keeps them apart and in order."""

    GLOO = "gloo"
    """A CPU's: threads of a rank make calls beside one another, and a tag keeps messages apart."""
    NCCL = "NCCL"
    """A GPU's: one stream makes a rank's calls in the order in which its host comes to them, and
    there are no tags."""


@dataclass
class Waits:
    """What waits for what: the beginning of each event and, of a call, its end too."""

    names: list[str] = field(default_factory=list)  # of each node
    after: list[list[int]] = field(default_factory=list)  # the nodes that wait for it

    def node(self, name: str) -> int:
        self.names.append(name)
        self.after.append([])
        return len(self.names) - 1

    def add(self, first: int, then: int) -> None:
        self.after[first].append(then)

    def cycle(self) -> list[str]:
        """Returns nodes that wait for one another in a circle; none where there is no such."""
        num_before = [0] * len(self.names)
        for followers in self.after:
            for node in followers:
                num_before[node] += 1
        ready = [node for node, count in enumerate(num_before) if not count]
        while ready:
            for node in self.after[ready.pop()]:
                num_before[node] -= 1
                if not num_before[node]:
                    ready.append(node)
        stuck = {node for node, count in enumerate(num_before) if count}
        return [self.names[node] for node in self._circle(stuck)]

    def _circle(self, stuck: set[int]) -> list[int]:
        before: dict[int, int] = {}  # a node that each stuck one waits for
        for node in stuck:
            before |= {follower: node for follower in self.after[node] if follower in stuck}
        seen: list[int] = []
        node = min(stuck, default=-1)
        while node in before and node not in seen:
            seen.append(node)
            node = before[node]
        return seen[seen.index(node) :] if node in seen else []

    def leads(self, first: int, last: int) -> bool:
        """Reports whether `last` waits for `first`, both of one rank, whose nodes follow each
        other."""
        reached, waiting = {first}, [first]
        while waiting:
            for node in self.after[waiting.pop()]:
                if node <= last and node not in reached:
                    reached.add(node)
                    waiting.append(node)
        return last in reached


def problems_of(programs: Sequence[Program], wire: Wire) -> list[str]:
    """Returns what is wrong between the ranks, in words; nothing where they fit together."""
    waits = Waits()
    sent: Ends = defaultdict(list)
    received: Ends = defaultdict(list)
    together: list[list[tuple[int, Call]]] = []  # the n-th call of all ranks: its nodes
    problems: list[str] = []
    for program in programs:
        nodes = _of_rank(waits, program, wire)
        num_together = 0
        for node, event in nodes:
            call = event.call
            if call is None:
                continue
            if call.tag is None:
                if num_together == len(together):
                    together.append([])
                together[num_together].append((node, call))
                num_together += 1
                continue
            tag = call.tag if wire is Wire.GLOO else 0
            for peer, num_bytes in call.sent.tolist():
                sent[program.rank, peer, tag].append((num_bytes, node, call.of))
            for peer, num_bytes in call.received.tolist():
                received[peer, program.rank, tag].append((num_bytes, node, call.of))
        if wire is Wire.GLOO:
            problems += _shared(waits, program.rank, nodes)
    problems += _matched(waits, sent, received)
    for number, calls in enumerate(together):
        problems += _met(waits, number, calls, world_size=len(programs))
    circle = waits.cycle()
    if circle:
        problems.append(f"wait for one another: {', '.join(circle[:8])}")
    return problems


def _of_rank(waits: Waits, program: Program, wire: Wire) -> list[tuple[int, Event]]:
    """Adds a rank's own order of events. Returns the node of each; the end of a call is the next
    node."""
    nodes: list[tuple[int, Event]] = []
    last: dict[str, int] = {}  # by place
    submitted: dict[str, int] = {}
    begun: dict[str, list[int]] = defaultdict(list)
    ended: dict[str, int] = {}
    for number, event in enumerate(program.events):
        name = f"rank {program.rank}'s {event.what} {number} ({event.place})"
        node = waits.node(name)
        nodes.append((node, event))
        is_in_order = wire is Wire.NCCL
        place = "" if is_in_order else event.place
        if place in last:
            waits.add(last[place], node)
        last[place] = node
        match event.what:
            case "call":
                last[place] = waits.node(f"the end of {name}")
                waits.add(node, last[place])
            case "submit":
                most, before = event.most_waiting, begun[event.side]
                if most and len(before) >= most and not is_in_order:
                    waits.add(before[-most], node)
                submitted[event.side] = node
            case "begin":
                waits.add(submitted[event.place], node)
                begun[event.place].append(node)
            case "end":
                ended[event.place] = node
            case "wait":
                if event.side in ended:
                    waits.add(ended[event.side], node)
    return nodes


def _matched(waits: Waits, sent: Ends, received: Ends) -> Iterator[str]:
    """Has each message wait for both of its ends. Yields what does not fit."""
    for channel in sorted(sent.keys() | received.keys()):
        source, target, tag = channel
        who = f"rank {source} to rank {target}, tag {tag}"
        outgoing, incoming = sent.get(channel, []), received.get(channel, [])
        if len(outgoing) != len(incoming):
            yield f"{who}: {len(outgoing)} messages are sent and {len(incoming)} received"
        for number, (out, into) in enumerate(zip(outgoing, incoming, strict=False)):
            if out[0] != into[0]:
                yield f"{who}: message {number} has {out[0]} bytes, and {into[0]} are expected"
            if out[2] != into[2]:
                yield f"{who}: message {number} is of {out[2]}, and {into[2]} are expected"
            waits.add(out[1], into[1] + 1)
            waits.add(into[1], out[1] + 1)


def _met(
    waits: Waits, number: int, calls: Sequence[tuple[int, Call]], *, world_size: int
) -> Iterator[str]:
    """Has a call of all ranks wait for all of them. Yields what does not fit."""
    if len(calls) != world_size:
        yield f"call {number} of all ranks is made by {len(calls)} of {world_size}"
        return
    meeting = waits.node(f"call {number} of all ranks")
    expected: dict[tuple[int, int], int] = {}
    for rank, (node, call) in enumerate(calls):
        waits.add(node, meeting)
        waits.add(meeting, node + 1)
        expected |= {(peer, rank): num_bytes for peer, num_bytes in call.received.tolist()}
        if call.of != calls[0][1].of:
            yield f"call {number} of all ranks is of {call.of} on rank {rank}, of {calls[0][1].of} on rank 0"
    for rank, (_, call) in enumerate(calls):
        for peer, num_bytes in call.sent.tolist():
            wanted = expected.pop((rank, peer), 0)
            if wanted != num_bytes:
                yield (
                    f"call {number} of all ranks: rank {rank} sends rank {peer} {num_bytes} bytes, "
                    f"and {wanted} are expected"
                )
    for (source, target), num_bytes in expected.items():
        yield f"call {number} of all ranks: rank {target} expects {num_bytes} bytes of {source}"


def _shared(waits: Waits, rank: int, nodes: Sequence[tuple[int, Event]]) -> Iterator[str]:
    """Yields the tags that two threads of a rank use at a time: which message comes first would be
    anybody's guess."""
    last: dict[int | None, tuple[int, str]] = {}  # by tag: the end of a call, and its place
    for node, event in nodes:
        if event.call is None:
            continue
        tag = event.call.tag
        end, place = last.get(tag, (0, event.place))
        if place != event.place and not waits.leads(end, node):
            yield f"rank {rank}: {place} and {event.place} exchange at a time with tag {tag}"
        last[tag] = node + 1, event.place
