"""Admission, order, chunks of prompts and release of blocks, without a model."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from model.generation.sampling_params import SamplingParams
from serving.engine.block_pool import BlockPool
from serving.engine.messages import FinishReason, SequenceRequest
from serving.engine.scheduler import MOST_TIMES, Chunk, Scheduler, Sequence

EOS = 0


def request(
    seq_id: int,
    *,
    num_prompt: int = 1,
    max_tokens: int = 3,
    ignore_eos: bool = False,
    prompt_logprobs: bool = False,
) -> SequenceRequest:
    return SequenceRequest(
        seq_id=seq_id,
        prompt_ids=[1] * num_prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        ignore_eos=ignore_eos,
        num_prompt_logprobs=0 if prompt_logprobs else None,
    )


def scheduler(
    *,
    max_num_seqs: int = 2,
    num_blocks: int = 100,
    budget: int = 100,
    keep_prefixes: bool = False,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, keep_prefixes=keep_prefixes),
        max_num_seqs=max_num_seqs,
        eos_id=EOS,
        prefill_tokens_per_step=budget,
    )


def step(target: Scheduler, *, token_id: int = 5) -> list[tuple[int, int, int]]:
    """What was read: (sequence, first, last)."""
    plan = target.plan()
    for chunk in plan:
        target.advance(chunk, token_id if chunk.draws else None)
    return [(chunk.sequence.request.seq_id, chunk.first, chunk.last) for chunk in plan]


def test_a_sequence_waits_is_read_and_frees_its_place() -> None:
    target = scheduler(max_num_seqs=1)
    first, second = target.add(request(1, max_tokens=2)), target.add(request(2, max_tokens=1))
    assert (target.num_running, target.num_waiting) == (0, 2)
    assert step(target) == [(1, 0, 1)]
    assert (first.num_read, second.num_read) == (1, 0)
    assert (len(first.blocks), target.num_running, target.num_waiting) == (1, 1, 1)
    assert step(target) == [(1, 1, 2)]
    assert (first.blocks, first.output_ids, target.num_running) == ([], [5, 5], 0)
    assert step(target) == [(2, 0, 1)]
    assert (second.output_ids, target.num_running, target.num_waiting) == ([5], 0, 0)


def test_reasons_to_finish() -> None:
    target = scheduler()
    assert target.advance(_admitted(target, request(1, max_tokens=1)), 5) is FinishReason.LENGTH
    assert target.advance(_admitted(target, request(2, max_tokens=1)), EOS) is FinishReason.STOP
    assert target.advance(_admitted(target, request(3, max_tokens=0)), None) is FinishReason.LENGTH
    kept = _admitted(target, request(4, max_tokens=2, ignore_eos=True))
    assert target.advance(kept, EOS) is None
    assert kept.sequence.output_ids == [EOS]


def test_a_sequence_may_not_end_before_its_least_number_of_tokens() -> None:
    target = scheduler()
    long = replace(request(1, max_tokens=9), min_tokens=2, stop_token_ids=(7,))
    sequence = target.add(long)
    forbidden = []
    for _ in range(3):
        forbidden.append(sequence.forbidden_ids)
        step(target)
    assert forbidden == [{EOS, 7}, {EOS, 7}, set()]


def _admitted(target: Scheduler, of: SequenceRequest) -> Chunk:
    sequence = target.add(of)
    [chunk] = [chunk for chunk in target.plan() if chunk.sequence is sequence]
    return chunk


def test_a_plan_tells_whom_it_admits_and_counts_prompt_tokens_read_or_in_the_cache() -> None:
    target = scheduler(budget=20, keep_prefixes=True)
    assert (target.num_prompt_tokens, target.num_looked_up, target.num_found) == (0, 0, 0)
    target.add(request(0, num_prompt=30, max_tokens=9))
    step(target)
    assert (target.admitted, target.num_prompt_tokens) == ([0], 20)
    target.add(request(1, num_prompt=30, max_tokens=9))
    step(target)
    assert (target.admitted, target.num_prompt_tokens) == ([1], 10 + (16 + 10))
    step(target)
    assert (target.admitted, target.num_prompt_tokens) == ([], 4)
    step(target)
    assert target.num_prompt_tokens == 0


def test_prompts_are_read_in_chunks_within_the_budget_while_others_go_on() -> None:
    target = scheduler(max_num_seqs=8, budget=10)
    for seq_id, num_prompt in enumerate([4, 25, 3, 1]):
        target.add(request(seq_id, num_prompt=num_prompt, max_tokens=9))
    assert step(target) == [(0, 0, 4), (1, 0, 6)]
    assert step(target) == [(0, 4, 5), (1, 6, 16)]
    assert step(target) == [(0, 5, 6), (1, 16, 25), (2, 0, 1)]
    assert step(target) == [(0, 6, 7), (1, 25, 26), (2, 1, 3), (3, 0, 1)]


def test_a_burst_is_read_faster_the_fewer_sequences_wait_for_their_next_token() -> None:
    target = scheduler(max_num_seqs=40, budget=10)
    learn_speed(target, tokens_per_s=1e6)

    def num_read() -> int:
        return sum(last - first for _, first, last in step(target) if last - first > 1)

    for seq_id in range(30):
        target.add(request(seq_id, num_prompt=20, max_tokens=15))
    assert num_read() == 80  # nobody waits for a next token: MOST_TIMES
    assert num_read() == 80  # 4 do, and 26 for their first: 13 times, bounded
    assert num_read() == 55  # 8 do, and 22 for their first: 5.5 times
    assert num_read() == 40  # 10 do, and 20 for their first
    assert num_read() == 30  # 12 do, and 18
    assert num_read() == 22


def test_a_burst_takes_a_second_at_most_by_what_its_tokens_have_cost() -> None:
    def first_step(*, tokens_per_s: float | None) -> list[tuple[int, int, int]]:
        target = scheduler(max_num_seqs=4, budget=10)
        if tokens_per_s is not None:
            learn_speed(target, tokens_per_s=tokens_per_s)
        target.add(request(0, num_prompt=300))
        return step(target)

    assert first_step(tokens_per_s=None) == [(0, 0, 10)]  # nothing is known yet
    assert first_step(tokens_per_s=37) == [(0, 0, 37)]
    assert first_step(tokens_per_s=2) == [(0, 0, 10)]
    assert first_step(tokens_per_s=1000) == [(0, 0, 10 * MOST_TIMES)]


def test_a_step_that_reads_few_prompt_tokens_tells_nothing_about_their_speed() -> None:
    target = scheduler(max_num_seqs=4, budget=10)
    learn_speed(target, tokens_per_s=1000)
    target.learn_speed([Chunk(target.add(request(0)), 0, 1)], seconds=5.0)
    target.add(request(1, num_prompt=300))
    assert step(target) == [(0, 0, 1), (1, 0, 79)]


def learn_speed(target: Scheduler, *, tokens_per_s: float) -> None:
    read = Chunk(Sequence(request(99, num_prompt=100)), 90, 100)
    target.learn_speed([read], seconds=10 / tokens_per_s)


def test_sequences_without_a_place_make_no_burst() -> None:
    target = scheduler(max_num_seqs=2, budget=10)
    learn_speed(target, tokens_per_s=1e6)
    target.add(request(0, max_tokens=9))
    step(target)
    for seq_id in range(1, 50):
        target.add(request(seq_id, num_prompt=30, max_tokens=9))
    assert step(target) == [(0, 1, 2), (1, 0, 20)]  # one waits for each, and 48 for a place


def test_a_sequence_waits_for_blocks_for_all_that_it_may_get() -> None:
    target = scheduler(max_num_seqs=8, num_blocks=4)
    target.add(request(0, num_prompt=20, max_tokens=20))  # 3 blocks
    target.add(request(1, num_prompt=10, max_tokens=10))  # 2 blocks
    target.add(request(2, num_prompt=1, max_tokens=1))  # would fit, but came later
    assert step(target) == [(0, 0, 20)]
    assert target.num_waiting == 2
    target.cancel(0)
    assert step(target) == [(1, 0, 10), (2, 0, 1)]


def test_the_same_start_of_a_prompt_is_read_once() -> None:
    target = scheduler(keep_prefixes=True)
    target.add(request(0, num_prompt=40, max_tokens=1))
    assert step(target) == [(0, 0, 40)]
    target.add(request(1, num_prompt=50, max_tokens=1))
    # Its last token has to be read for the first one drawn
    target.add(request(2, num_prompt=32, max_tokens=1))
    assert step(target) == [(1, 32, 50), (2, 16, 32)]
    assert (target.num_looked_up, target.num_found) == (50 + 32, 32 + 16)
    target.add(request(3, num_prompt=40, max_tokens=1, prompt_logprobs=True))
    assert step(target) == [(3, 0, 40)]
    assert (target.num_looked_up, target.num_found) == (0, 0)


def test_a_prompt_that_is_being_read_is_waited_for_and_shared() -> None:
    target = scheduler(max_num_seqs=8, keep_prefixes=True, budget=30)
    for seq_id in range(3):  # the choices of one request
        target.add(request(seq_id, num_prompt=50, max_tokens=2))
    target.add(request(3, num_prompt=4))  # came later
    assert step(target) == [(0, 0, 30)]
    assert step(target) == [(0, 30, 50)]
    assert step(target) == [(0, 50, 51), (1, 48, 50), (2, 48, 50), (3, 0, 4)]


def test_a_prompt_is_read_once_for_all_choices_where_the_first_gives_its_logprobs() -> None:
    target = scheduler(max_num_seqs=8, keep_prefixes=True, budget=30)
    for seq_id in range(3):
        target.add(request(seq_id, num_prompt=50, max_tokens=2, prompt_logprobs=seq_id == 0))
    assert step(target) == [(0, 0, 30)]
    assert step(target) == [(0, 30, 50)]
    assert step(target) == [(0, 50, 51), (1, 48, 50), (2, 48, 50)]


def test_a_reader_that_leaves_makes_nobody_wait() -> None:
    target = scheduler(keep_prefixes=True, budget=30)
    for seq_id in range(2):
        target.add(request(seq_id, num_prompt=50))
    assert step(target) == [(0, 0, 30)]
    target.cancel(0)
    assert step(target) == [(1, 16, 46)]  # of what it left, a whole block


def test_what_a_failed_sequence_left_is_found_by_nobody() -> None:
    target = scheduler(keep_prefixes=True, budget=5)
    target.add(request(0, num_prompt=40, max_tokens=1))
    [chunk] = target.plan()
    target.advance(chunk, None)
    assert target.fail(chunk.sequence) is FinishReason.ERROR
    target.add(request(1, num_prompt=40, max_tokens=1))
    assert step(target) == [(1, 0, 5)]


def test_waiting_and_running_sequences_are_cancelled() -> None:
    target = scheduler(max_num_seqs=1)
    running, _ = target.add(request(1)), target.add(request(2))
    step(target)
    target.cancel(2)
    assert (target.num_running, target.num_waiting) == (1, 0)
    target.cancel(1)
    assert (running.blocks, target.num_running) == ([], 0)
    target.cancel(1)
    target.add(request(3))
    assert step(target) == [(3, 0, 1)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "step", "step", "cancel"]), st.integers(0, 60)),
        max_size=60,
    )
)
def test_whatever_happens_tokens_are_read_once_and_everybody_ends(
    actions: list[tuple[str, int]],
) -> None:
    pool = BlockPool(12, keep_prefixes=True)
    target = Scheduler(pool, max_num_seqs=3, eos_id=EOS, prefill_tokens_per_step=10)
    added: list[Sequence] = []
    finished: set[int] = set()
    cancelled: set[int] = set()
    order: list[int] = []

    def run_step() -> None:
        plan = target.plan()
        num_prompt_tokens = sum(c.last - c.first for c in plan if not c.sequence.output_ids)
        assert len(plan) <= 3 and num_prompt_tokens <= 10 * MOST_TIMES
        for chunk in plan:
            sequence = chunk.sequence
            assert chunk.first == sequence.num_read < chunk.last <= sequence.num_tokens
            assert (
                len(sequence.blocks) * 16
                >= len(sequence.request.prompt_ids) + sequence.request.max_tokens
            )
            if sequence.request.seq_id not in order:
                order.append(sequence.request.seq_id)
            if target.advance(chunk, 5 if chunk.draws else None) is not None:
                finished.add(sequence.request.seq_id)
                assert len(sequence.output_ids) == sequence.request.max_tokens

    for action, number in actions:
        if action == "add":
            added.append(
                target.add(request(len(added), num_prompt=1 + number, max_tokens=1 + number % 4))
            )
        elif action == "cancel" and added:
            seq_id = number % len(added)
            if seq_id not in finished:
                cancelled.add(seq_id)
            target.cancel(seq_id)
        elif action == "step":
            run_step()
    for _ in range(12 * len(added)):
        run_step()
    assert finished | cancelled == set(range(len(added))) and not finished & cancelled
    assert (target.num_running, target.num_waiting, pool.usage) == (0, 0, 0)
    assert order == sorted(order)


def test_prompts_are_read_in_larger_steps_while_no_sequence_waits_for_its_next_token() -> None:
    target = scheduler(max_num_seqs=3, budget=10)
    learn_speed(target, tokens_per_s=1e6)
    target.add(request(0, num_prompt=90, max_tokens=9))
    assert step(target) == [(0, 0, 80)]
    target.add(request(1, num_prompt=100, max_tokens=9))
    assert step(target) == [(0, 80, 90), (1, 0, 70)]
    assert step(target) == [(0, 90, 91), (1, 70, 90)]  # one waits for each


def test_a_scope_finds_its_own_prompts_only() -> None:
    """Or a key could tell by the time to its first token whether another one has sent a prompt."""
    target = scheduler(num_blocks=30, keep_prefixes=True)

    def found_by(seq_id: int, scope: str) -> int:
        target.add(replace(request(seq_id, num_prompt=50, max_tokens=1), cache_scope=scope))
        step(target)
        return target.num_found

    assert [found_by(1, "alice"), found_by(2, "bob"), found_by(3, ""), found_by(4, "alice"), found_by(5, "bob")] == [
        0, 0, 0, 48, 48,
    ]  # fmt: skip
    assert found_by(6, "") == 48
