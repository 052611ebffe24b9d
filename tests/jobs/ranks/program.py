"""What one rank of a world does in a step, as the others see it: calls that exchange messages, and
which of its threads makes each.

The exchange's own code runs on tensors that have no memory, and hands its messages to a recorder
instead of to torch. Work beside the caller is recorded where it is submitted, at once: so the calls
are in the order in which a host tells a GPU's streams to make them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import raymill.state.gathered_weights
import raymill.state.train_state
import raymill.sums.batch_sum
import raymill.sums.bucket_exchange
from raymill.state.bundle import Bundle
from raymill.state.gathered_weights import GatheredWeights
from raymill.step_timer import StepTimer
from raymill.sums.bucket_exchange import BucketExchange
from raymill.sums.shard_sums import ShardSums

CALLER = "caller"
SIDES = {
    "sums": raymill.sums.batch_sum,
    "gathers": raymill.sums.bucket_exchange,
    "updates": raymill.state.train_state,
    "weights": raymill.state.gathered_weights,
}
"""Where work beside the caller is begun, by the name that it has here."""

LABELS: list[tuple[type, str, Callable[..., str]]] = [
    (BucketExchange, "exchange", lambda _, bucket: f"the sums of bucket {bucket}"),
    (ShardSums, "_add", lambda _, bucket, *rest: f"the pieces of bucket {bucket}"),
    (Bundle, "gather", lambda bundle, *rest, **named: f"values from {bundle.span.start} on"),
    (GatheredWeights, "_gather", lambda _, target, homes: f"weights from {homes[0].span.start} on"),
]
"""The methods that exchange something: what it is, from their arguments."""

Messages = NDArray[np.int64]
"""The peer and the bytes of each (n, 2), in order."""


class NothingThereError(Exception):
    """What a gather would have brought is about to be read, and nobody has sent it."""


@dataclass(frozen=True)
class Call:
    """Messages that are under way together. It is over when all have arrived."""

    sent: Messages
    received: Messages
    tag: int | None  # None: all ranks make this call, which no tag keeps apart
    of: str = ""  # what the messages are part of, such as a bucket

    @property
    def bytes_sent(self) -> int:
        return int(self.sent[:, 1].sum())


class Event(NamedTuple):
    """A moment of one of a rank's threads."""

    what: Literal["call", "submit", "begin", "end", "wait"]
    place: str  # the thread
    side: str = ""  # that is given work, or waited for
    call: Call | None = None
    most_waiting: int = 0  # for a side's thread, beside what runs: the next one waits for room


@dataclass
class Program:
    """The events of one rank, in the order in which its host comes to them, and what it holds."""

    rank: int
    events: list[Event] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    """Bytes by their name in a plan (`jobs/plan/memory`)."""
    received_bytes: int = 0  # of others' sums at a time, at most

    @property
    def calls(self) -> list[Call]:
        return [event.call for event in self.events if event.call is not None]


def one_by_one(program: Program) -> Program:
    """Returns the program of a rank that sends, then receives, one message after another."""
    events: list[Event] = []
    for event in program.events:
        if event.call is None or event.call.tag is None:
            events.append(event)
            continue
        none = event.call.sent[:0]
        singles = [replace(event.call, sent=row[None], received=none) for row in event.call.sent]
        for row in event.call.received:
            singles.append(replace(event.call, sent=none, received=row[None]))
        events += [event._replace(call=call) for call in singles]
    return Program(program.rank, events)


class Recorder:
    """Takes the place of what sends."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.program = Program(rank)
        self._world_size = world_size
        self._places = [CALLER]
        self._labels = [""]

    @contextmanager
    def in_place_of_torch(self) -> Iterator[None]:
        """Lasts while the exchange of this process is recorded."""
        with pytest.MonkeyPatch.context() as patched:
            for name, module in SIDES.items():
                patched.setattr(module, "side_work", partial(RecordedSide, self, name))
            for kind, method, label in LABELS:
                patched.setattr(kind, method, self._labelled(getattr(kind, method), label))
            patched.setattr(dist, "P2POp", PeerMessage)
            patched.setattr(dist, "batch_isend_irecv", self._exchange)
            patched.setattr(dist, "all_to_all_single", self._all_to_all)
            patched.setattr(dist, "all_gather_single", self._all_gather)
            yield

    def note(self, event: Event) -> None:
        self.program.events.append(event)

    @property
    def place(self) -> str:
        return self._places[-1]

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        self._places.append(place)
        self.note(Event("begin", place))
        yield
        self.note(Event("end", place))
        self._places.pop()

    def _exchange(self, messages: "list[PeerMessage]") -> list[dist.Work]:
        tags = {message.tag for message in messages}
        assert len(tags) == 1
        sent = [one for one in messages if one.op is dist.isend]
        received = [one for one in messages if one.op is dist.irecv]
        self._note_call(_of(sent), _of(received), tag=tags.pop())
        return []

    def _all_to_all(
        self, received: Tensor, sent: Tensor, num_received: list[int], num_sent: list[int]
    ) -> None:
        assert (len(received), len(sent)) == (sum(num_received), sum(num_sent))
        self._note_call(
            self._of_all(num_sent, sent.itemsize), self._of_all(num_received, received.itemsize)
        )

    def _all_gather(self, table: Tensor, own: Tensor) -> None:
        each = [len(own)] * self._world_size
        assert len(table) == sum(each)
        self._note_call(self._of_all(each, own.itemsize), self._of_all(each, own.itemsize))
        raise NothingThereError("nobody has sent it")

    def _of_all(self, lengths: list[int], itemsize: int) -> Messages:
        """Returns the messages of all other ranks, given the length of each."""
        peers = np.arange(self._world_size)
        messages = np.stack([peers, np.array(lengths) * itemsize], axis=1)
        return messages[(peers != self.program.rank) & (messages[:, 1] > 0)]

    def _note_call(self, sent: Messages, received: Messages, *, tag: int | None = None) -> None:
        call = Call(sent, received, tag, of=self._labels[-1])
        self.note(Event("call", self.place, call=call))

    def _labelled(
        self, method: Callable[..., None], label: Callable[..., str]
    ) -> Callable[..., None]:
        def labelled(*arguments: Any, **named: Any) -> None:
            self._labels.append(label(*arguments, **named))
            method(*arguments, **named)
            self._labels.pop()

        return labelled


class PeerMessage(NamedTuple):
    """In the place of torch's `P2POp`, which asks for a process group."""

    op: Callable[..., object]
    tensor: Tensor
    peer: int
    tag: int = 0


class RecordedSide:
    """In the place of a thread or a stream beside the caller."""

    streams = ()

    def __init__(
        self, recorder: Recorder, name: str, device: object, *, max_waiting: int = 0
    ) -> None:
        self._recorder = recorder
        self._name = name
        self._max_waiting = max_waiting

    def submit(self, call: Callable[..., None], *arguments: object) -> None:
        place = self._recorder.place
        event = Event("submit", place, side=self._name, most_waiting=self._max_waiting)
        self._recorder.note(event)
        with self._recorder.at(self._name):
            call(*arguments)

    def wait(self) -> None:
        self._recorder.note(Event("wait", self._recorder.place, side=self._name))

    @contextmanager
    def timed_by(self, timer: StepTimer | None) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass


def _of(messages: list[PeerMessage]) -> Messages:
    rows = [(message.peer, message.tensor.nbytes) for message in messages]
    return np.array(rows, np.int64).reshape(-1, 2)
