"""Copies the training state to the host beside the training: from a GPU in pieces through pinned memory, by a thread.

    training      step ── update ── forward, backward ── (wait) ── update ──
    GPU's copies              piece 1 ── piece 2 ── piece 3 …
    thread                             piece 1 ── piece 2 ── piece 3 …        into a snapshot or a checkpoint's copy

The next update waits until what it would overwrite is copied. On a CPU a copy is taken at once: its thread would only
take the step's own cores.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.monitoring.metric_table import Phase
from jobs.exact.state.flat_layout import PIECE_VALUES
from jobs.run.step_timer import StepTimer

Take = Callable[[Iterator[Tensor]], object]
"""Takes values end to end, in pieces on the host (n,), each of which is valid until the next one is asked for."""


@dataclass
class HostCopy:
    """A copy that is being taken."""

    phase: Phase
    exposed_s: float = 0.0  # for which training waited
    taken: Future[object] = field(default_factory=Future)


class HostCopies:
    """Takes the copies of one device's tensors, one after another; with `beside` in a thread, through two buffers, one
    of which is filled from the device while the other one is read."""

    def __init__(self, device: torch.device, *, beside: bool = False, piece_values: int = PIECE_VALUES) -> None:
        self._device, self._piece_values = device, piece_values
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []
        self._thread = ThreadPoolExecutor(1, "host copies") if beside or self._stream else None
        self._unfinished: list[HostCopy] = []

    def start(self, phase: Phase, tensors: Sequence[Tensor], take: Take) -> HostCopy:
        """Has the values copied that the tensors have now."""
        copy, start_s = HostCopy(phase), time.perf_counter()
        if self._thread is None:
            take(iter(tensors))
            copy.taken.set_result(None)
        else:
            now = torch.cuda.current_stream(self._device).record_event() if self._stream else None
            copy.taken = self._thread.submit(lambda: take(self.pieces(tensors, after=now)))
            self._unfinished.append(copy)
        copy.exposed_s = time.perf_counter() - start_s
        return copy

    def wait(self, timer: StepTimer | None = None) -> None:
        """Waits until no tensor is read any more, in the phases of the copies."""
        while self._unfinished:
            copy, start_s = self._unfinished.pop(0), time.perf_counter()
            with timer.phase(copy.phase) if timer else nullcontext():
                copy.taken.result()
            copy.exposed_s += time.perf_counter() - start_s

    def close(self) -> None:
        """Ends the thread after its copies."""
        if self._thread:
            self._thread.shutdown()

    def pieces(self, tensors: Sequence[Tensor], *, after: torch.cuda.Event | None = None) -> Iterator[Tensor]:
        """Yields the tensors' values, end to end, as they are after the event."""
        if not self._buffers:
            self._buffers = [torch.empty(self._piece_values, pin_memory=bool(self._stream)) for _ in range(2)]
        arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        with torch.cuda.stream(self._stream):  # which does nothing for None
            if after is not None and self._stream is not None:
                self._stream.wait_event(after)
            for number, views in enumerate(packed(tensors, self._piece_values)):
                piece = self._buffers[number % 2][: sum(map(len, views))]
                for target, view in zip(piece.split([*map(len, views)]), views, strict=True):
                    target.copy_(view, non_blocking=True)
                event = torch.cuda.Event(blocking=True) if self._stream else None
                if event is not None:
                    event.record()
                if arriving is not None:
                    yield _arrived(*arriving)
                arriving = piece, event
            if arriving is not None:
                yield _arrived(*arriving)


def _arrived(piece: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return piece


def packed(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields views of the tensors (n,), in order, in lists of `size` values together; the last has fewer."""
    views, room = [], size
    for tensor in tensors:
        rest = tensor
        while len(rest):
            views.append(rest[:room])
            rest, room = rest[room:], room - len(views[-1])
            if not room:
                yield views
                views, room = [], size
    if views:
        yield views
