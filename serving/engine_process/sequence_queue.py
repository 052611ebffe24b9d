"""What a new sequence would wait until the engine begins with it, by what the sequences before it have taken."""

import math
import time
from collections.abc import Callable

from serving.engine.messages import StepReport

WEIGHT = 0.1  # of the latest sequence, and of the latest step
FULL_SHARE = 0.5  # of what a step may read: a prompt of a few tokens takes the time of a whole step


class SequenceQueue:
    """Of one engine, as its replica sees it. Two things hold a sequence up: the room that others take (slots, and
    blocks of the KV cache), and their prompts, which are read before its own. Whichever takes longer is its wait."""

    def __init__(self, *, num_slots: int, tokens_per_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_step = FULL_SHARE * tokens_per_step
        self._num_slots = num_slots
        self._num_places = num_slots  # sequences of the present size that the cache has blocks for, too
        self._unread: dict[int, int] = {}  # prompt tokens of the sequences without a token, by sequence
        self._first_s: dict[int, float] = {}  # when the others had their first token, in that order
        self._residence_s = 0.0  # from there to the end, mean of recent ones
        self._read_tokens = self._read_s = 0.0  # recent steps that read as much of prompts as they may, or nearly so
        self._reading_since_s: float | None = None

    def enter(self, seq_id: int, *, num_prompt_tokens: int) -> None:
        if self._reading_since_s is None:
            self._reading_since_s = self._clock()
        self._unread[seq_id] = num_prompt_tokens

    def first_event(self, seq_id: int) -> None:
        """Its prompt has been read. Later events change nothing."""
        if self._unread.pop(seq_id, None) is not None:
            self._first_s[seq_id] = self._clock()

    def leave(self, seq_id: int) -> None:
        """It has ended, or its client is gone."""
        self._unread.pop(seq_id, None)
        if (first_s := self._first_s.pop(seq_id, None)) is not None:
            weight = WEIGHT if self._residence_s else 1.0
            self._residence_s += weight * (self._clock() - first_s - self._residence_s)

    def observe_step(self, report: StepReport) -> None:
        """After its events have been told of."""
        if report.num_running and report.kv_cache_usage:
            room = report.num_running / report.kv_cache_usage
            self._num_places = min(self._num_slots, math.floor(room + 0.01))  # the usage is rounded
        now_s = self._clock()
        if report.num_prompt_tokens >= self._full_step and self._reading_since_s is not None:
            self._read_tokens += report.num_prompt_tokens - WEIGHT * self._read_tokens
            self._read_s += now_s - self._reading_since_s - WEIGHT * self._read_s
        self._reading_since_s = now_s if self._unread else None

    def wait_s(self) -> float:
        """0 as long as nothing is known."""
        for_reading_s = sum(self._unread.values()) * self._read_s / self._read_tokens if self._read_tokens else 0.0
        return max(self._wait_for_room_s(), for_reading_s)

    def _wait_for_room_s(self) -> float:
        """One place after the other becomes free, on average each `residence / places`. Sequences that began together
        end together: as long as the oldest ones are younger than the average, they go on for the rest of it."""
        num_to_leave = len(self._unread) + len(self._first_s) + 1 - self._num_places
        if num_to_leave <= 0:
            return 0.0
        began_s = list(self._first_s.values())
        last_to_leave_s = began_s[num_to_leave - 1] if num_to_leave <= len(began_s) else self._clock()
        rest_s = last_to_leave_s + self._residence_s - self._clock()
        return max(num_to_leave * self._residence_s / self._num_places, rest_s)
