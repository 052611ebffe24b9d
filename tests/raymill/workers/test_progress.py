"""A worker's marks: on the host they count at once, on a GPU once the stream has come to them."""

import threading
from collections.abc import Iterator

import pytest
import torch

from raymill.workers.progress import Progress, name_of, range_of, ranks_of

CUDA = torch.device("cuda", 0)


class Stream:
    """Stands for a GPU's stream, which comes to its events as far as the test lets it."""

    cuda_stream = 1

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.num_reached = 0
        self.has_failed = False


class Event:
    def record(self, stream: Stream) -> None:
        self._stream, self._number = stream, len(stream.events)
        stream.events.append(self)

    def query(self) -> bool:
        if self._stream.has_failed:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self._number < self._stream.num_reached


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    yield stream


def test_a_message_of_the_host_is_open_while_a_thread_is_in_it() -> None:
    progress, inside, leave = Progress(), threading.Event(), threading.Event()

    def send() -> None:
        with progress.message(range_of([0, 2, 4])):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=send)
    thread.start()
    inside.wait()
    assert progress.messages() == {"0:5:2": (1, 0)}
    assert progress.is_in_message(on_gpu=False)
    assert not progress.is_in_message(on_gpu=True)
    leave.set()
    thread.join()
    assert progress.messages() == {"0:5:2": (1, 1)}
    assert not progress.is_in_message(on_gpu=False)
    assert progress.num_marks() == 2


def test_a_message_that_fails_is_left() -> None:
    progress = Progress()
    with pytest.raises(ConnectionError), progress.message(range(2)):
        raise ConnectionError
    assert not progress.is_in_message(on_gpu=False)


def test_a_kernel_that_never_ends_is_no_message_and_a_message_that_never_ends_is_one(
    stream: Stream,
) -> None:
    """The thread is long past both."""
    progress = Progress()
    progress.end_pass(CUDA)
    with progress.message(range(2), CUDA):
        pass
    stream.num_reached = 1  # the pass is over, and something is still before the message
    assert progress.num_marks() == 1
    assert not progress.is_in_message(on_gpu=True)
    assert progress.messages() == {}
    stream.num_reached = 2
    assert progress.is_in_message(on_gpu=True)
    assert progress.messages() == {"0:2:1": (1, 0)}
    stream.num_reached = 3
    assert not progress.is_in_message(on_gpu=True)
    assert progress.messages() == {"0:2:1": (1, 1)}


def test_a_device_that_failed_holds_nobody_up(stream: Stream) -> None:
    progress = Progress()
    with progress.message(range(2), CUDA):
        pass
    stream.has_failed = True
    assert not progress.is_in_message(on_gpu=True)


def test_marks_that_nobody_looks_at_do_not_pile_up(stream: Stream) -> None:
    progress = Progress()
    for number in range(100):
        stream.num_reached = number
        progress.end_pass(CUDA)
    assert sum(map(len, progress._coming.values())) <= 2


def test_ranks_at_equal_distances_have_a_name_and_others_have_none() -> None:
    assert range_of([5]) == range(5, 6)
    assert ranks_of(name_of(range_of([1, 4, 7]))) == range(1, 8, 3)
    with pytest.raises(AssertionError):
        range_of([0, 1, 3])
