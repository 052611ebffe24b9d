"""How long steps take in which prompts are read, and what that means for first tokens and those after them."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from serving.engine.block_pool import BlockPool
from serving.engine.messages import SequenceRequest
from serving.engine.prompt_budget import BACKLOG_S, LEAST_TOKENS, LONGEST, MOST_TOKENS, STEP_S, PromptBudget
from serving.engine.scheduler import Scheduler

FIRST = 96
NUM_STREAMS = 16


@dataclass
class Machine:
    """What a step takes, in seconds."""

    fixed_s: float
    row_s: float  # a sequence's next token
    token_s: float  # a prompt's token

    def step_s(self, num_prompt_tokens: int, num_continued: int) -> float:
        return self.fixed_s + self.row_s * num_continued + self.token_s * num_prompt_tokens


ZEN5 = Machine(fixed_s=0.0034, row_s=0.0004, token_s=0.00023)
"""A model of 124M parameters on two cores of an EPYC with AVX-512, in bf16."""


def measured(machine: Machine, *, num_continued: int, num_steps: int = 60) -> PromptBudget:
    """A budget after steps of the machine, with prompts in each second one."""
    budget = PromptBudget(None, first=FIRST)
    for number in range(num_steps):
        num_tokens = budget.tokens(num_unread=0) if number % 2 else 0
        step_s = machine.step_s(num_tokens, num_continued)
        budget.observe(num_prompt_tokens=num_tokens, num_continued=num_continued, step_s=step_s)
    return budget


def test_a_setting_fixes_the_budget_and_none_begins_with_the_default() -> None:
    fixed, free = PromptBudget(40, first=FIRST), PromptBudget(None, first=FIRST)
    assert free.tokens(num_unread=9999) == FIRST
    for budget in (fixed, free):
        budget.observe(num_prompt_tokens=100, num_continued=0, step_s=1.0)
    assert fixed.tokens(num_unread=9999) == 40
    assert free.tokens(num_unread=9999) == LEAST_TOKENS


@given(
    st.floats(0.0005, 0.02),
    st.floats(0.00001, 0.002),
    st.floats(0.00001, 0.01),
    st.integers(1, 16),
    st.integers(0, 9999),
)
def test_a_step_takes_its_time_or_twice_that_of_its_other_tokens(
    fixed_s: float, row_s: float, token_s: float, num_continued: int, num_unread: int
) -> None:
    machine = Machine(fixed_s, row_s, token_s)
    num_tokens = measured(machine, num_continued=num_continued).tokens(num_unread=num_unread)
    decoding_s, step_s = machine.step_s(0, num_continued), machine.step_s(num_tokens, num_continued)
    stretch = min(max(num_unread * token_s / BACKLOG_S, 1.0), LONGEST)
    expected_s = max(stretch * STEP_S, 2 * decoding_s)
    assert LEAST_TOKENS <= num_tokens <= MOST_TOKENS
    if num_tokens > LEAST_TOKENS:
        assert step_s <= 1.01 * expected_s
    if num_tokens < MOST_TOKENS:
        assert step_s + token_s >= 0.99 * expected_s


def test_a_step_that_was_held_up_changes_little() -> None:
    budget = measured(ZEN5, num_continued=8)
    before = budget.tokens(num_unread=0)
    budget.observe(num_prompt_tokens=before, num_continued=8, step_s=60.0)
    budget.observe(num_prompt_tokens=0, num_continued=8, step_s=60.0)
    assert 0.7 * before < budget.tokens(num_unread=0) < before


@dataclass
class Stream:
    """One client after another of a closed loop: the next prompt comes when the last answer has ended."""

    num_prompt: int
    asked_s: float = 0.0
    latest_s: float | None = None
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    def ask(self, now_s: float) -> None:
        self.asked_s, self.latest_s = now_s, None

    def receive(self, now_s: float) -> None:
        if self.latest_s is None:
            self.first_s.append(now_s - self.asked_s)
        else:
            self.between_s.append(now_s - self.latest_s)
        self.latest_s = now_s


def closed_loop(
    machine: Machine, budget: PromptBudget, prompts: list[int], *, new_tokens: int = 64, rounds: int = 4
) -> tuple[list[float], list[float]]:
    """Returns the times to first tokens and between tokens, in the machine's seconds. All streams begin at once."""
    pool = BlockPool(16 * 64, keep_prefixes=False)
    target = Scheduler(pool, max_num_seqs=NUM_STREAMS, eos_id=None, budget=budget)
    streams = [Stream(num_prompt) for num_prompt in prompts]
    to_come: list[Iterator[int]] = [iter(range(rounds)) for _ in streams]
    now_s = 0.0

    def ask(number: int) -> None:
        if next(to_come[number], None) is not None:
            streams[number].ask(now_s)
            prompt_ids = [1] * streams[number].num_prompt
            target.add(SequenceRequest(number, prompt_ids, new_tokens, SamplingParams(), ignore_eos=True))

    for number in range(len(streams)):
        ask(number)
    while target.num_running + target.num_waiting:
        plan = target.plan()
        num_tokens = sum(chunk.last - chunk.first for chunk in plan)
        continued = target.num_continued
        step_s = machine.step_s(num_tokens - continued, continued)
        budget.observe(num_prompt_tokens=num_tokens - continued, num_continued=continued, step_s=step_s)
        now_s += step_s
        for chunk in plan:
            number = chunk.sequence.request.seq_id
            if chunk.draws:
                streams[number].receive(now_s)
            if target.advance(chunk, 1 if chunk.draws else None) is not None:
                ask(number)
    first_s = [s for stream in streams for s in stream.first_s]
    assert len(first_s) == rounds * len(streams), "everybody is answered"
    return first_s, [s for stream in streams for s in stream.between_s]


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]


def test_sixteen_streams_at_once_have_short_gaps_and_no_late_first_token() -> None:
    first_s, between_s = closed_loop(ZEN5, PromptBudget(None, first=FIRST), [128] * NUM_STREAMS)
    reading_s = NUM_STREAMS * 128 * ZEN5.token_s  # of all prompts, and nothing else
    assert p99(between_s) < 1.2 * STEP_S
    assert p99(first_s) < 1.6 * reading_s
    assert statistics.median(first_s) < 0.4 * reading_s


def test_many_long_prompts_lengthen_steps_so_that_none_is_late() -> None:
    prompts = [64, 800] * (NUM_STREAMS // 2)
    first_s, between_s = closed_loop(ZEN5, PromptBudget(None, first=FIRST), prompts)
    fixed_first_s, _ = closed_loop(ZEN5, PromptBudget(FIRST, first=FIRST), prompts)
    assert p99(first_s) < 0.95 * p99(fixed_first_s)
    assert max(between_s) < 1.1 * LONGEST * STEP_S


def test_on_a_slow_machine_a_step_reads_fewer_tokens() -> None:
    slow = Machine(10 * ZEN5.fixed_s, 10 * ZEN5.row_s, 10 * ZEN5.token_s)
    _, between_s = closed_loop(slow, PromptBudget(None, first=FIRST), [128] * NUM_STREAMS)
    assert p99(between_s) < 2.1 * slow.step_s(0, NUM_STREAMS)
    _, fixed_between_s = closed_loop(slow, PromptBudget(FIRST, first=FIRST), [128] * NUM_STREAMS)
    assert p99(between_s) < 0.8 * p99(fixed_between_s)
