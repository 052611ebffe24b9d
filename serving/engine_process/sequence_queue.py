"""Estimates how long a new sequence would wait until the engine starts it, from how long others
have taken."""

import math
import time
from collections.abc import Callable, Collection

from serving.engine.messages import StepReport

WEIGHT = 0.1  # of the latest sequence, and of the latest step, in the means
# Of the tokens that a step may read; a prompt of a few tokens takes as long as a whole step
FULL_SHARE = 0.5


class SequenceQueue:
    """One engine's queue as its replica sees it. A sequence waits for room (slots and blocks of the
    KV cache) and for the prompts that are read before its own. The longer of the two is its
    wait."""

    def __init__(
        self, *, num_slots: int, tokens_per_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._full_step = FULL_SHARE * tokens_per_step
        self._num_slots = num_slots
        # Slots for which the cache has blocks, with sequences as large as now
        self.num_places = num_slots
        self.unread: dict[int, int] = {}  # prompt tokens of each sequence that has no token yet
        # When each other sequence got its first token, in that order
        self._first_s: dict[int, float] = {}
        self._residence_s = 0.0  # mean time from the first token to the end
        # Of recent steps that read about as many prompt tokens as allowed
        self._read_tokens = self._read_s = 0.0
        self._reading_since_s: float | None = None

    def enter(self, seq_id: int, *, num_prompt_tokens: int) -> None:
        if self._reading_since_s is None:
            self._reading_since_s = self._clock()
        self.unread[seq_id] = num_prompt_tokens

    def first_event(self, seq_id: int) -> None:
        """Records that the sequence's prompt has been read. Later events change nothing."""
        if self.unread.pop(seq_id, None) is not None:
            self._first_s[seq_id] = self._clock()

    def leave(self, seq_id: int) -> None:
        """Records that the sequence has ended, or that its client has left."""
        self.unread.pop(seq_id, None)
        if (first_s := self._first_s.pop(seq_id, None)) is not None:
            weight = WEIGHT if self._residence_s else 1.0
            self._residence_s += weight * (self._clock() - first_s - self._residence_s)

    def observe_step(self, report: StepReport) -> None:
        """Records a step, after its events."""
        if report.num_running and report.kv_cache_usage:
            room = report.num_running / report.kv_cache_usage
            self.num_places = min(self._num_slots, math.floor(room + 0.01))  # the usage is rounded
        if self._reading_since_s is None and not self.unread:  # as most of the time
            return
        now_s = self._clock()
        if report.num_prompt_tokens >= self._full_step and self._reading_since_s is not None:
            self._read_tokens += report.num_prompt_tokens - WEIGHT * self._read_tokens
            self._read_s += now_s - self._reading_since_s - WEIGHT * self._read_s
        self._reading_since_s = now_s if self.unread else None

    def wait_s(self, passed: Collection[int] = ()) -> float:
        """Returns the expected wait of a sequence that passes some of the waiting ones; 0 as long
        as nothing is known."""
        if not self.unread and len(self._first_s) < self.num_places:
            return 0.0
        num_unread = sum(self.unread.values()) - sum(self.unread[seq_id] for seq_id in passed)
        for_reading_s = num_unread * self._read_s / self._read_tokens if self._read_tokens else 0.0
        return max(self._wait_for_room_s(len(self.unread) - len(passed)), for_reading_s)

    def _wait_for_room_s(self, num_before: int) -> float:
        """Returns the expected wait for room behind as many that wait for it. On average a place
        becomes free each `residence / places`. Sequences that began together end together: while
        the oldest are younger than the average, they continue for the rest of it."""
        num_to_leave = num_before + len(self._first_s) + 1 - self.num_places
        if num_to_leave <= 0:
            return 0.0
        began_s = list(self._first_s.values())
        last_to_leave_s = (
            began_s[num_to_leave - 1] if num_to_leave <= len(began_s) else self._clock()
        )
        rest_s = last_to_leave_s + self._residence_s - self._clock()
        return max(num_to_leave * self._residence_s / self.num_places, rest_s)
