"""A model of a GPU's streams: which operation reads and writes which memory, on which stream, after
what. Two that meet in the same memory, one of which writes, and neither of which waits for the
other, are a race.

The order is what the program itself makes: operations of one stream follow each other, an event is
behind what its stream had been told before, a host that waits for a stream is behind it, and tells
others only then (Lamport's clocks, by stream). Tensors have shapes and no values.

    with Timeline().in_place_of_cuda() as timeline:
        ...                                     # tensors on torch's device meta
    assert timeline.races == []
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raymill.side_thread import SideStream
from tests.jobs.ranks.program import SIDES, NothingThereError, PeerMessage

Clock = dict[str, int]
"""The number of the last operation of each stream or thread that is known to be over."""


@dataclass
class Agent:
    """A stream, or a thread of the host."""

    name: str
    clock: Clock = field(default_factory=dict)

    def follow(self, clock: Clock) -> None:
        """Has what comes next wait for all that the clock knows of."""
        for name, number in clock.items():
            self.clock[name] = max(number, self.clock.get(name, 0))


@dataclass(frozen=True)
class Access:
    """One operation's use of a stretch of memory."""

    what: str
    agent: str
    number: int
    start: int  # in bytes
    stop: int
    writes: bool

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.agent, 0) >= self.number


@dataclass
class Memory:
    """A tensor's storage, as PyTorch's allocator knows it."""

    owner: Agent  # the stream on which it was asked for, whose next operations may get it again
    accesses: list[Access] = field(default_factory=list)
    users: list[Agent] = field(default_factory=list)  # by `record_stream`


class ModelStream(Agent):
    """In the place of `torch.cuda.Stream`."""

    def __init__(self, timeline: "Timeline", name: str) -> None:
        super().__init__(name)
        self._timeline = timeline
        self.cuda_stream = id(self)

    def wait_stream(self, other: "ModelStream") -> None:
        self.follow(other.clock)

    def wait_event(self, event: "ModelEvent") -> None:
        self.follow(event.clock)

    def record_event(self) -> "ModelEvent":
        event = ModelEvent(self._timeline)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._timeline.host.follow(self.clock)


class ModelEvent:
    """In the place of `torch.cuda.Event`."""

    def __init__(self, timeline: "Timeline", **_: object) -> None:
        self._timeline = timeline
        self.clock: Clock = {}

    def record(self, stream: ModelStream | None = None) -> None:
        self.clock = dict((stream or self._timeline.current).clock)

    def synchronize(self) -> None:
        self._timeline.host.follow(self.clock)

    def wait(self) -> None:
        """As the `Work` of a message does: the current stream waits, not the host."""
        self._timeline.current.follow(self.clock)


class ModelThread:
    """In the place of a `ThreadPoolExecutor` of one thread: what is submitted runs at once, and yet
    nobody is behind it who has not asked for its result."""

    def __init__(self, timeline: "Timeline") -> None:
        self._timeline = timeline
        self._agent = Agent("copying thread")

    def submit(self, call: Callable[..., object], *arguments: object) -> "ModelThread":
        timeline = self._timeline
        self._agent.follow(timeline.host.clock)
        before, timeline.host = timeline.host, self._agent
        try:
            call(*arguments)
        finally:
            timeline.host = before
        return self

    def result(self) -> None:
        self._timeline.host.follow(self._agent.clock)

    def shutdown(self) -> None:
        pass


class Timeline(TorchDispatchMode):
    """Sees each operation as it is told to the current stream."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = ModelStream(self, "main stream")
        self.messages = ModelStream(self, "messages")  # NCCL's own stream
        self.host = Agent("host")
        self.races: list[str] = []
        self.num_operations = 0
        self._num_streams = 0
        self._memory: dict[int, Memory] = {}

    @contextmanager
    def in_place_of_cuda(self) -> Iterator[Self]:
        """Lasts while this process computes as if its tensors were a GPU's."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._forget(storage._cdata)
            if size:
                self._memory[storage._cdata] = self._new_memory()
            return resize(storage, size)

        def recorded(tensor: Tensor, stream: ModelStream) -> None:
            self._memory_of(tensor).users.append(stream)

        with pytest.MonkeyPatch.context() as patched:
            for module in SIDES.values():
                patched.setattr(module, "side_work", lambda device, **_: SideStream(device))
            patched.setattr(torch.cuda, "Stream", lambda *_: self._new_stream())
            patched.setattr(torch.cuda, "Event", lambda **named: ModelEvent(self, **named))
            patched.setattr(torch.cuda, "current_stream", lambda *_: self.current)
            patched.setattr(torch.cuda, "stream", self._on)
            patched.setattr(torch.Tensor, "record_stream", recorded)
            patched.setattr(torch.UntypedStorage, "resize_", resized)
            patched.setattr(dist, "P2POp", PeerMessage)
            patched.setattr(dist, "batch_isend_irecv", self._exchange)
            patched.setattr(dist, "all_to_all_single", self._all_to_all)
            patched.setattr(dist, "all_gather_single", self._all_gather)
            with self:
                yield self

    def read_on_host(self, tensor: Tensor) -> None:
        """Has the host read a tensor's values, which nothing waits for."""
        self._use(self.host, [(tensor, False)], "a read on the host")

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        uses = [(tensor, writes) for tensor, writes in _arguments(func, args, named)]
        known = {_key(tensor) for tensor, _ in uses}
        made = func(*args, **named)
        fresh = [one for one in tree_leaves(made) if _is_seen(one) and _key(one) not in known]
        is_view = not fresh and not any(writes for _, writes in uses)
        for tensor in fresh:
            self._remember(tensor)
        name = func.overloadpacket.__name__
        if not is_view and not name.startswith(("empty", "new_empty")):
            self._use(self.current, [*uses, *((tensor, True) for tensor in fresh)], name)
        return made

    def _new_stream(self) -> ModelStream:
        self._num_streams += 1
        return ModelStream(self, f"stream {self._num_streams}")

    @contextmanager
    def _on(self, stream: ModelStream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def _exchange(self, messages: list[PeerMessage]) -> list[ModelEvent]:
        uses = [(message.tensor, message.op is dist.irecv) for message in messages]
        return [self._send(uses)]

    def _all_to_all(self, received: Tensor, sent: Tensor, *_: object) -> None:
        self._send([(received, True), (sent, False)]).wait()

    def _all_gather(self, table: Tensor, own: Tensor) -> None:
        self._send([(table, True), (own, False)]).wait()
        raise NothingThereError("nobody has sent it")

    def _send(self, uses: list[tuple[Tensor, bool]]) -> ModelEvent:
        """Has NCCL's stream send and receive behind the current one. Returns the event behind
        that."""
        self.messages.follow(self.current.clock)
        self._use(self.messages, uses, "a message")
        return self.messages.record_event()

    def _new_memory(self) -> Memory:
        """Returns memory that operations on the current stream may have had until now."""
        memory = Memory(self.current)
        number = self.current.clock.get(self.current.name, 0)
        if number:
            last_owner = Access("what had its memory", self.current.name, number, 0, 1 << 62, True)
            memory.accesses.append(last_owner)
        return memory

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._memory[storage._cdata] = self._new_memory()
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _memory_of(self, tensor: Tensor) -> Memory:
        key = _key(tensor)
        if key not in self._memory:  # it is as old as the timeline
            self._memory[key] = Memory(self.main)
        return self._memory[key]

    def _forget(self, key: int) -> None:
        """Gives memory back, which the next operation on its owner's stream may get."""
        memory = self._memory.pop(key, None)
        if memory is None:
            return
        behind = Agent("")
        for agent in (memory.owner, self.host, *memory.users):
            behind.follow(agent.clock)
        for access in memory.accesses:
            if not access.is_before(behind.clock):
                self._note(f"memory is free again while {access.agent} has {access.what}")

    def _use(self, agent: Agent, uses: list[tuple[Tensor, bool]], what: str) -> None:
        """Has a stream, or the host, use tensors next, behind what the host knows to be over."""
        self.num_operations += 1
        agent.follow(self.host.clock)
        number = agent.clock.get(agent.name, 0) + 1
        for tensor, writes in uses:
            if tensor.numel():
                start, stop = _extent(tensor)
                access = Access(what, agent.name, number, start, stop, writes)
                self._add(self._memory_of(tensor), access, agent.clock)
        agent.clock[agent.name] = number

    def _add(self, memory: Memory, access: Access, clock: Clock) -> None:
        kept: list[Access] = []
        for other in memory.accesses:
            meets = other.start < access.stop and access.start < other.stop
            is_own = (other.agent, other.number) == (access.agent, access.number)
            is_known = other.is_before(clock)
            if meets and (other.writes or access.writes) and not (is_own or is_known):
                self._note(f"{access.agent} has {access.what} beside {other.what} of {other.agent}")
            is_inside = access.start <= other.start and other.stop <= access.stop
            is_replaced = is_known and is_inside and (access.writes or not other.writes)
            if not is_replaced:
                kept.append(other)
        memory.accesses = [*kept, access]

    def _note(self, race: str) -> None:
        if race not in self.races:
            self.races.append(race)


def _arguments(
    func: Any, args: tuple[Any, ...], named: Mapping[str, Any]
) -> Iterator[tuple[Tensor, bool]]:
    """Yields the tensors that an operation is given, and whether it writes each."""
    declared = {argument.name: argument for argument in func._schema.arguments}
    given = dict(zip(declared, args, strict=False)) | dict(named)
    for name, value in given.items():
        alias = declared[name].alias_info
        for leaf in tree_leaves(value):
            if _is_seen(leaf):
                yield leaf, alias is not None and alias.is_write


def _is_seen(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the first byte of a tensor in its storage, and the one behind its last."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sides)
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize
