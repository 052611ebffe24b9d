"""What a new sequence would wait: for room, or for the prompts before its own."""

from itertools import count

import pytest

from serving.engine.messages import StepReport
from serving.engine_process.sequence_queue import SequenceQueue

PROMPT_TOKENS = 10


class Line:
    """A queue whose clock is turned by hand."""

    def __init__(self, *, num_slots: int) -> None:
        self.now_s = 0.0
        self.queue = SequenceQueue(
            num_slots=num_slots, tokens_per_step=PROMPT_TOKENS, clock=lambda: self.now_s
        )
        self._ids = count()

    def enter(self, *, num_prompt_tokens: int = PROMPT_TOKENS) -> int:
        seq_id = next(self._ids)
        self.queue.enter(seq_id, num_prompt_tokens=num_prompt_tokens)
        return seq_id

    def step(
        self, took_s: float, *, num_read: int = 0, num_running: int = 0, kv_cache_usage: float = 0.0
    ) -> None:
        self.now_s += took_s
        self.queue.observe_step(StepReport([], num_running, 0, kv_cache_usage, num_read))

    def start(self, *, read_s: float = 0.0, num_prompt_tokens: int = PROMPT_TOKENS) -> int:
        """A sequence, up to its first token."""
        seq_id = self.enter(num_prompt_tokens=num_prompt_tokens)
        self.now_s += read_s
        self.queue.first_event(seq_id)
        self.step(0, num_read=num_prompt_tokens)
        return seq_id

    def live_through(self, residence_s: float) -> None:
        seq_id = self.start()
        self.step(residence_s)
        self.queue.leave(seq_id)


def test_nobody_waits_while_nothing_is_known_or_there_is_room() -> None:
    line = Line(num_slots=4)
    for _ in range(9):
        line.enter()
    assert line.queue.wait_s() == 0
    line = Line(num_slots=4)
    line.live_through(8)
    for _ in range(3):
        line.start()
    assert line.queue.wait_s() == 0


def test_slots_become_free_one_after_the_other() -> None:
    line = Line(num_slots=4)
    line.live_through(8)
    for _ in range(4):
        line.start()
        line.step(2)
    assert line.queue.wait_s() == pytest.approx(2)
    for _ in range(7):
        line.enter()
    assert line.queue.wait_s() == pytest.approx(16)


def test_sequences_that_began_together_end_together() -> None:
    line = Line(num_slots=4)
    line.live_through(8)
    for _ in range(4):
        line.start()
    assert line.queue.wait_s() == pytest.approx(8)
    line.step(5)
    assert line.queue.wait_s() == pytest.approx(3)
    line.step(2.9)
    assert line.queue.wait_s() == pytest.approx(2), "they may take longer than the average"


def test_blocks_of_the_cache_may_be_scarcer_than_slots() -> None:
    line = Line(num_slots=16)
    line.live_through(6)
    line.start()
    line.step(3, num_running=1, kv_cache_usage=0.4)  # blocks for two
    assert line.queue.wait_s() == 0
    line.start()
    assert line.queue.wait_s() == pytest.approx(3)
    line.step(0, num_running=2, kv_cache_usage=0.1)
    assert line.queue.wait_s() == 0


def test_prompts_are_read_one_after_the_other() -> None:
    line = Line(num_slots=16)
    for _ in range(3):
        line.start(read_s=0.5, num_prompt_tokens=100)
    line.step(7)  # reads none
    assert line.queue.wait_s() == 0
    for _ in range(3):
        line.enter(num_prompt_tokens=200)
    assert line.queue.wait_s() == pytest.approx(3)
    line.step(1, num_read=400)  # most were in the cache
    assert 1.5 < line.queue.wait_s() < 3


def test_who_leaves_is_not_waited_for() -> None:
    line = Line(num_slots=1)
    line.live_through(8)
    running, waiting = line.start(), line.enter()
    assert line.queue.wait_s() == pytest.approx(16)
    line.queue.leave(waiting)
    assert line.queue.wait_s() == pytest.approx(8)
    line.queue.leave(running)
    assert line.queue.wait_s() == 0


@pytest.mark.parametrize("tokens_per_s", [5, 50, 500])
def test_an_idle_engine_keeps_nobody_waiting_however_slowly_it_reads(tokens_per_s: float) -> None:
    line = Line(num_slots=16)
    for _ in range(3):
        seq_id = line.start(read_s=PROMPT_TOKENS / tokens_per_s)
        line.step(10 / tokens_per_s)
        assert line.queue.wait_s() == 0, "it has read all there is, and has room"
        line.queue.leave(seq_id)
        assert line.queue.wait_s() == 0
    line.enter()
    assert line.queue.wait_s() == pytest.approx(PROMPT_TOKENS / tokens_per_s, rel=0.2), (
        "behind another's prompt"
    )


def test_a_short_prompt_says_nothing_of_the_pace_of_reading() -> None:
    line = Line(num_slots=16)
    # A whole step for one token, as in a replica's self-test
    line.start(read_s=0.1, num_prompt_tokens=1)
    for _ in range(16):
        line.enter(num_prompt_tokens=1000)
    assert line.queue.wait_s() == 0
