"""Decides which tokens a step reads, and when a sequence is admitted and ends. No tensors."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serving.engine.block_pool import BLOCK_TOKENS, BlockPool, root_of
from serving.engine.messages import Candidates, FinishReason, SequenceRequest
from serving.structured.token_mask import TokenMask

MOST_TIMES = 8
"""The most by which the prompt tokens of a step are multiplied."""

DELAYED_BY_ONE = 2
"""Sequences that may be delayed for each one that is answered sooner, with full multiples."""

LONGEST_BURST_S = 1.0
"""The seconds that a multiplied step takes, by the cost of earlier prompt tokens."""


@dataclass(eq=False)
class Sequence:
    """A sequence that waits, or runs and holds KV cache blocks for all tokens that it may get."""

    request: SequenceRequest
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # in the order of their tokens
    num_read: int = 0  # tokens whose keys and values are in the cache
    sealed_prefix: bytes = b""  # of the full blocks among them
    # Prefixes to the ends of the blocks that it is about to read
    promised: list[bytes] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()  # that end it
    # Of the tokens read, when asked for
    prompt_logprobs: list[Candidates | None] = field(default_factory=list)
    # The engine's, of the tokens read, for an embedding
    hidden_states: list[Any] = field(default_factory=list)
    # The engine's: the grammar that it follows, at its start, and where in it the sequence is
    compiled_grammar: Any = None
    mask: TokenMask | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """The ids that its next token may not have."""
        return self.stop_ids if len(self.output_ids) < self.request.min_tokens else frozenset()


class Chunk(NamedTuple):
    """Tokens `first` to `last` - 1 of a sequence. A step reads them, and draws a token if they are
    the last ones."""

    sequence: Sequence
    first: int
    last: int

    @property
    def draws(self) -> bool:
        return self.last == self.sequence.num_tokens


class Scheduler:
    """First come, first served. A sequence is admitted when there are blocks for its prompt and all
    tokens that it may get, so it always runs to its end. A sequence whose prompt starts like one
    that is being read waits for that one and shares its blocks: the choices of a request read their
    prompt once.

    A step gives each running sequence its next token, and reads up to `prefill_tokens_per_step`
    prompt tokens while the running sequences wait. Where many sequences wait for their first token
    beside those that wait for their next one, it reads several times more, up to `MOST_TIMES` and
    `LONGEST_BURST_S`: a burst of requests is answered sooner, and there are few that it delays.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        eos_id: int | None,
        prefill_tokens_per_step: int,
    ) -> None:
        self.pool = pool
        self._max_num_seqs = max_num_seqs
        self._eos_id = eos_id
        self._prefill_tokens_per_step = prefill_tokens_per_step
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # in order of admission
        self._promised: set[bytes] = set()
        self.admitted: list[int] = []  # sequences, by the latest plan
        self.found: list[int] = []  # of each of them, tokens that the cache had
        self.num_prompt_tokens = 0  # read by the latest plan, or found in the cache
        self._prompt_tokens_per_s: float | None = None  # of the latest step that read many
        # Prompt tokens that it looked for in the cache, and found there
        self.num_looked_up = self.num_found = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: SequenceRequest) -> Sequence:
        of_text = () if request.ignore_eos or self._eos_id is None else (self._eos_id,)
        sequence = Sequence(request, stop_ids=frozenset((*request.stop_token_ids, *of_text)))
        self._waiting.append(sequence)
        return sequence

    def plan(self) -> list[Chunk]:
        """Admits what fits, and returns what this step reads."""
        budget = self._prompt_budget()
        chunks = []
        self.admitted, self.found = [], []
        self.num_prompt_tokens = self.num_looked_up = self.num_found = 0
        for sequence in self._running.values():
            if sequence.output_ids:
                chunks.append(Chunk(sequence, sequence.num_read, sequence.num_tokens))
            else:  # the one prompt that the last step did not end
                chunks.append(_prompt_chunk(sequence, budget))
                budget -= chunks[-1].last - chunks[-1].first
                self.num_prompt_tokens += chunks[-1].last - chunks[-1].first
        while budget > 0 and (admitted := self._admit()) is not None:
            chunks.append(_prompt_chunk(admitted, budget))
            budget -= chunks[-1].last - chunks[-1].first
            self.admitted.append(admitted.request.seq_id)
            self.num_prompt_tokens += chunks[-1].last
            self.num_looked_up += (
                0 if admitted.request.reads_whole_prompt else len(admitted.request.prompt_ids)
            )
            self.found.append(chunks[-1].first)
            self.num_found += chunks[-1].first
        return chunks

    def advance(self, chunk: Chunk, token_id: int | None) -> FinishReason | None:
        """Records that a chunk was read, and the token that it drew. Returns why its sequence has
        finished, if it has."""
        sequence = chunk.sequence
        sequence.num_read = chunk.last
        self._seal(sequence, first=chunk.first)
        if not chunk.draws:
            return None
        self._end_promise(sequence)
        if token_id is not None:
            sequence.output_ids.append(token_id)
        stops = token_id in sequence.stop_ids
        if not stops and len(sequence.output_ids) < sequence.request.max_tokens:
            return None
        self._release(sequence)
        return FinishReason.STOP if stops else FinishReason.LENGTH

    def learn_speed(self, chunks: list[Chunk], *, seconds: float) -> None:
        """Learns from a step how fast prompts are read. One that reads few of their tokens tells
        nothing: it waits for the weights."""
        num_read = sum(c.last - c.first for c in chunks if not c.sequence.output_ids)
        if num_read >= self._prefill_tokens_per_step:
            self._prompt_tokens_per_s = num_read / seconds

    def fail(self, sequence: Sequence) -> FinishReason:
        """Ends a sequence whose blocks no other may share."""
        self.pool.forget(sequence.blocks)
        self._release(sequence)
        return FinishReason.ERROR

    def end(self, chunk: Chunk) -> None:
        """Ends a sequence whose chunk was read, and for which no token can be drawn."""
        self.advance(chunk, None)
        self._release(chunk.sequence)

    def cancel(self, seq_id: int) -> None:
        """Ends a sequence that waits or runs. It is no error if the sequence has finished
        meanwhile."""
        if seq_id in self._running:
            self._release(self._running[seq_id])
            return
        self._waiting = deque(s for s in self._waiting if s.request.seq_id != seq_id)

    def _prompt_budget(self) -> int:
        """Returns how many prompt tokens this step reads at most."""
        num_answered = sum(bool(sequence.output_ids) for sequence in self._running.values())
        num_free = self._max_num_seqs - len(self._running)
        num_unanswered = len(self._running) - num_answered + min(self.num_waiting, num_free)
        least = self._prefill_tokens_per_step
        if self._prompt_tokens_per_s is None:
            return least
        times = DELAYED_BY_ONE * num_unanswered / num_answered if num_answered else MOST_TIMES
        burst = min(least * min(times, MOST_TIMES), self._prompt_tokens_per_s * LONGEST_BURST_S)
        return max(least, int(burst))

    def _admit(self) -> Sequence | None:
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        sequence, request = self._waiting[0], self._waiting[0].request
        known = [] if request.reads_whole_prompt else request.prompt_ids
        root = root_of(request.cache_scope)
        missing = self.pool.missing(request.prompt_ids, root=root)
        if known and missing and missing[0] in self._promised:
            return None
        num_tokens = len(request.prompt_ids) + request.max_tokens
        allocation = self.pool.allocate(num_tokens, prompt_ids=known, root=root)
        if allocation is None:
            return None
        self._waiting.popleft()
        sequence.blocks, sequence.num_read = allocation
        sequence.promised, sequence.sealed_prefix = missing, root
        self._promised.update(missing)
        self._seal(sequence, first=0)
        self._running[request.seq_id] = sequence
        return sequence

    def _seal(self, sequence: Sequence, *, first: int) -> None:
        """Marks the blocks that have become full since `first` tokens were read."""
        for index in range(first // BLOCK_TOKENS, sequence.num_read // BLOCK_TOKENS):
            token_ids = sequence.request.prompt_ids + sequence.output_ids
            tokens = token_ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            sequence.sealed_prefix = self.pool.seal(
                sequence.blocks[index], tokens, before=sequence.sealed_prefix
            )

    def _end_promise(self, sequence: Sequence) -> None:
        self._promised.difference_update(sequence.promised)
        sequence.promised = []

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.request.seq_id]
        self._end_promise(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []


def _prompt_chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, sequence.num_read, min(sequence.num_tokens, sequence.num_read + budget))
