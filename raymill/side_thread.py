"""Runs calls in order beside the caller: in a thread on a CPU, on a separate stream on a GPU."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from raymill.step_timer import StepTimer

Call = Callable[..., None]


class _TimedWaits:
    """Counts the caller's waits as the phase `sync` of a step, in whatever phase they come."""

    _timer: StepTimer | None = None

    @contextmanager
    def timed_by(self, timer: StepTimer | None) -> Iterator[None]:
        """Lasts as long as the timer measures the caller's step."""
        self._timer = timer
        try:
            yield
        finally:
            self._timer = None

    def _waits(self) -> AbstractContextManager[None]:
        return self._timer.phase("sync") if self._timer else nullcontext()


class SideThread(_TimedWaits):
    """Runs calls in a thread, where at most `max_waiting` wait, if that is not 0. A call that fails
    ends the work: `wait` raises its error."""

    streams: Sequence[torch.cuda.Stream] = ()  # on which calls run

    def __init__(self, max_waiting: int = 0) -> None:
        self._calls: queue.Queue[partial[None] | None] = queue.Queue(max_waiting)
        self._error: BaseException | None = None
        # A daemon: a process whose peers are gone must be able to end while a call still waits for
        # them.
        threading.Thread(target=self._run, name="exchange", daemon=True).start()

    def submit(self, call: Call, *arguments: object) -> None:
        with self._waits():
            self._calls.put(partial(call, *arguments))

    def wait(self) -> None:
        """Waits until all submitted calls have run."""
        with self._waits():
            self._calls.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the thread after the call that is running."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    call()
                except BaseException as error:
                    self._error = error
            self._calls.task_done()


class SideStream(_TimedWaits):
    """Runs calls that only enqueue kernels and collectives, which then run beside the caller's
    stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.streams = [self._stream]

    def submit(self, call: Call, *arguments: object) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            call(*arguments)

    def wait(self) -> None:
        """Makes the caller's stream wait, not the caller."""
        with self._waits():
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        pass


def side_work(device: torch.device, *, max_waiting: int = 0) -> SideThread | SideStream:
    return SideStream(device) if device.type == "cuda" else SideThread(max_waiting)
