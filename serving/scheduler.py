"""Which sequences run in a step: slots, the waiting queue, and all transitions of a sequence's state. No tensors."""

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from serving.messages import FinishReason, SequenceRequest


class State(Enum):
    WAITING = auto()  # accepted; no slot yet
    PREFILL = auto()  # holds a slot; its prompt is read in this step
    DECODE = auto()  # holds a slot; gains one token a step
    FINISHED = auto()  # ended; holds nothing


@dataclass(eq=False)
class Sequence:
    request: SequenceRequest
    state: State = State.WAITING
    slot: int = -1  # meaningful in PREFILL and DECODE only
    output_ids: list[int] = field(default_factory=list)


class Plan(NamedTuple):
    """One step: `prefill` reads its prompts, `decode` (in the order of its slots) gains a token each."""

    prefill: list[Sequence]
    decode: list[Sequence]


class Scheduler:
    """First come, first served. A slot holds a whole context, so an admitted sequence always runs to its end.

    `prefill_tokens_per_step` bounds how long running sequences wait for others' prompts: a step admits prompts
    while they fit into it, and at least one.
    """

    def __init__(self, *, num_slots: int, eos_id: int | None, prefill_tokens_per_step: int) -> None:
        self._eos_id = eos_id
        self._prefill_tokens_per_step = prefill_tokens_per_step
        # The lowest free slot first: neighbours in the cache are read without a copy.
        self._free_slots = list(range(num_slots))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: SequenceRequest) -> Sequence:
        sequence = Sequence(request)
        self._waiting.append(sequence)
        return sequence

    def plan(self) -> Plan:
        """Admits what fits, and says what this step does."""
        decode = sorted(self._running.values(), key=lambda sequence: sequence.slot)
        prefill: list[Sequence] = []
        budget = self._prefill_tokens_per_step
        while self._waiting and self._free_slots:
            num_tokens = len(self._waiting[0].request.prompt_ids)
            if prefill and num_tokens > budget:
                break
            budget -= num_tokens
            prefill.append(self._admit(self._waiting.popleft()))
        return Plan(prefill, decode)

    def advance(self, sequence: Sequence, token_id: int | None) -> FinishReason | None:
        """Records the token that a step gave `sequence`; says why it has finished, if it has."""
        request = sequence.request
        if token_id is not None:
            sequence.output_ids.append(token_id)
        if token_id is not None and token_id == self._eos_id and not request.ignore_eos:
            return self.finish(sequence, FinishReason.STOP)
        if len(sequence.output_ids) >= request.max_tokens:
            return self.finish(sequence, FinishReason.LENGTH)
        sequence.state = State.DECODE
        return None

    def finish(self, sequence: Sequence, reason: FinishReason) -> FinishReason:
        self._release(sequence)
        return reason

    def cancel(self, seq_id: int) -> None:
        """Forgets a sequence, whatever its state. One that has finished meanwhile is no error."""
        if seq_id in self._running:
            self._release(self._running[seq_id])
            return
        self._waiting = deque(s for s in self._waiting if s.request.seq_id != seq_id)

    def _admit(self, sequence: Sequence) -> Sequence:
        sequence.state = State.PREFILL
        sequence.slot = heapq.heappop(self._free_slots)
        self._running[sequence.request.seq_id] = sequence
        return sequence

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.request.seq_id]
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.state = State.FINISHED
        sequence.slot = -1
