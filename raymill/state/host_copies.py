"""Copies the training state to the host beside the training: from a GPU in pieces through pinned
memory, by a thread.

    training      step ── update ── forward, backward ── (wait) ── update ──
    GPU's copies              piece 1 ── piece 2 ── piece 3 …
    thread                             piece 1 ── piece 2 ── piece 3 …        into a snapshot or a checkpoint's copy

The next update waits until what it would overwrite is copied. On a CPU the copy is synchronous; a
thread would compete with the step for cores.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from raymill.phases import Phase
from raymill.state.flat_layout import PIECE_VALUES
from raymill.step_timer import StepTimer

Take = Callable[[Iterator[Tensor]], object]
"""Takes values end to end, in pieces on the host (n,), each of which is valid until the next one is
asked for."""


@dataclass
class HostCopy:
    """A copy on its way."""

    phase: Phase
    exposed_s: float = 0.0  # seconds for which training waited
    future: Future[object] = field(default_factory=Future)


class _Arriving(NamedTuple):
    """A piece on its way to the host."""

    piece: Tensor
    event: torch.cuda.Event | None  # after its last value

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.piece


class HostCopies:
    """Takes the copies of one device's tensors, one after another; with `beside` in a thread,
    through two buffers, one of which is filled from the device while the other one is read."""

    def __init__(
        self, device: torch.device, *, beside: bool = False, piece_values: int = PIECE_VALUES
    ) -> None:
        self._device = device
        self._piece_values = piece_values
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []
        self._thread = ThreadPoolExecutor(1, "host copies") if beside or self._stream else None
        self._unfinished: list[HostCopy] = []

    def start(self, phase: Phase, tensors: Sequence[Tensor], take: Take) -> HostCopy:
        """Has the values copied that the tensors have now."""
        copy = HostCopy(phase)
        start_s = time.perf_counter()
        if self._thread is None:
            take(iter(tensors))
            copy.future.set_result(None)
        else:
            now = torch.cuda.current_stream(self._device).record_event() if self._stream else None
            copy.future = self._thread.submit(self._copy, tensors, take, now)
            self._unfinished.append(copy)
        copy.exposed_s = time.perf_counter() - start_s
        return copy

    def wait(self, timer: StepTimer | None = None) -> None:
        """Waits until no tensor is read any more, in the phases of the copies."""
        while self._unfinished:
            copy = self._unfinished.pop(0)
            start_s = time.perf_counter()
            with timer.phase(copy.phase) if timer else nullcontext():
                copy.future.result()
            copy.exposed_s += time.perf_counter() - start_s

    def close(self) -> None:
        """Ends the thread after its copies."""
        if self._thread:
            self._thread.shutdown()

    def _copy(
        self, tensors: Sequence[Tensor], take: Take, after: torch.cuda.Event | None
    ) -> object:
        return take(self.pieces(tensors, after=after))

    def pieces(
        self, tensors: Sequence[Tensor], *, after: torch.cuda.Event | None = None
    ) -> Iterator[Tensor]:
        """Yields the tensors' values, end to end, as they are after the event."""
        while len(self._buffers) < 2:
            buffer = torch.empty(self._piece_values, pin_memory=self._stream is not None)
            self._buffers.append(buffer)
        arriving: _Arriving | None = None
        with torch.cuda.stream(self._stream):  # which does nothing for None
            if after is not None and self._stream is not None:
                self._stream.wait_event(after)
            for number, views in enumerate(packed(tensors, self._piece_values)):
                following = self._fill(self._buffers[number % 2], views)
                if arriving is not None:
                    yield arriving.wait()
                arriving = following
            if arriving is not None:
                yield arriving.wait()

    def _fill(self, buffer: Tensor, views: Sequence[Tensor]) -> _Arriving:
        """Begins to copy the views to the front of a buffer, end to end."""
        end = 0
        for view in views:
            target = buffer[end : end + len(view)]
            target.copy_(view, non_blocking=True)
            end += len(view)
        event = None
        if self._stream is not None:
            event = torch.cuda.Event(blocking=True)
            event.record()
        return _Arriving(buffer[:end], event)


def packed(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields views of the tensors (n,), in order, in lists of `size` values together; the last has
    fewer."""
    views: list[Tensor] = []
    room = size
    for tensor in tensors:
        rest = tensor
        while len(rest):
            view = rest[:room]
            views.append(view)
            rest = rest[len(view) :]
            room -= len(view)
            if not room:
                yield views
                views = []
                room = size
    if views:
        yield views
