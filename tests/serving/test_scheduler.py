"""Admission, order and release of slots, without a model."""

from hypothesis import given
from hypothesis import strategies as st

from model.sampling import SamplingParams
from serving.messages import FinishReason, SequenceRequest
from serving.scheduler import Plan, Scheduler, Sequence, State

EOS = 0


def request(seq_id: int, *, num_prompt: int = 1, max_tokens: int = 3, ignore_eos: bool = False) -> SequenceRequest:
    return SequenceRequest(
        seq_id=seq_id,
        prompt_ids=[1] * num_prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        ignore_eos=ignore_eos,
    )


def scheduler(*, num_slots: int = 2, budget: int = 100) -> Scheduler:
    return Scheduler(num_slots=num_slots, eos_id=EOS, prefill_tokens_per_step=budget)


def ids(plan: Plan) -> tuple[list[int], list[int]]:
    return [s.request.seq_id for s in plan.prefill], [s.request.seq_id for s in plan.decode]


def step(target: Scheduler, *, token_id: int = 5) -> tuple[list[int], list[int]]:
    plan = target.plan()
    for sequence in [*plan.prefill, *plan.decode]:
        target.advance(sequence, token_id)
    return ids(plan)


def test_a_sequence_waits_prefills_decodes_and_frees_its_slot() -> None:
    target = scheduler(num_slots=1)
    first, second = target.add(request(1, max_tokens=2)), target.add(request(2, max_tokens=1))
    assert (first.state, second.state, target.num_waiting) == (State.WAITING, State.WAITING, 2)
    assert step(target) == ([1], [])
    assert (first.state, first.slot, target.num_running) == (State.DECODE, 0, 1)
    assert step(target) == ([], [1])
    assert first.state is State.FINISHED
    assert step(target) == ([2], [])
    assert (second.state, target.num_running, target.num_waiting) == (State.FINISHED, 0, 0)


def test_reasons_to_finish() -> None:
    target = scheduler()
    assert target.advance(_admitted(target, request(1, max_tokens=1)), 5) is FinishReason.LENGTH
    assert target.advance(_admitted(target, request(2, max_tokens=1)), EOS) is FinishReason.STOP
    assert target.advance(_admitted(target, request(3, max_tokens=0)), None) is FinishReason.LENGTH
    kept = _admitted(target, request(4, max_tokens=2, ignore_eos=True))
    assert target.advance(kept, EOS) is None
    assert kept.output_ids == [EOS]


def _admitted(target: Scheduler, of: SequenceRequest) -> Sequence:
    sequence = target.add(of)
    assert target.plan().prefill == [sequence]
    return sequence


def test_prompts_of_a_step_stay_within_the_budget_but_one_always_goes() -> None:
    target = scheduler(num_slots=8, budget=10)
    for seq_id, num_prompt in enumerate([50, 6, 4, 1]):
        target.add(request(seq_id, num_prompt=num_prompt))
    assert step(target) == ([0], [])
    assert step(target) == ([1, 2], [0])
    assert step(target) == ([3], [0, 1, 2])


def test_cancel_in_every_state() -> None:
    target = scheduler(num_slots=1)
    running, waiting = target.add(request(1)), target.add(request(2))
    step(target)
    target.cancel(2)
    assert target.num_waiting == 0 and waiting.state is State.WAITING
    target.cancel(1)
    assert running.state is State.FINISHED and target.num_running == 0
    target.cancel(1)
    target.add(request(3))
    assert step(target) == ([3], [])


@given(st.lists(st.tuples(st.sampled_from(["add", "step", "step", "cancel"]), st.integers(0, 30)), max_size=60))
def test_whatever_happens_slots_are_held_once_and_everybody_ends(actions: list[tuple[str, int]]) -> None:
    target = scheduler(num_slots=3, budget=10)
    added, finished, cancelled = [], set(), set()
    order = []

    def run_step() -> None:
        plan = target.plan()
        running = [*plan.prefill, *plan.decode]
        slots = [s.slot for s in running]
        assert len(set(slots)) == len(slots) <= 3 and set(slots) <= {0, 1, 2}
        assert [s.slot for s in plan.decode] == sorted(s.slot for s in plan.decode)
        order.extend(s.request.seq_id for s in plan.prefill)
        for sequence in running:
            if target.advance(sequence, 5) is not None:
                finished.add(sequence.request.seq_id)
                assert len(sequence.output_ids) == sequence.request.max_tokens

    for action, number in actions:
        if action == "add":
            added.append(target.add(request(len(added), num_prompt=1 + number, max_tokens=1 + number % 4)))
        elif action == "cancel" and added:
            seq_id = number % len(added)
            if seq_id not in finished:
                cancelled.add(seq_id)
            target.cancel(seq_id)
        elif action == "step":
            run_step()
    for _ in range(5 * len(added)):
        run_step()
    assert finished | cancelled == set(range(len(added))) and not finished & cancelled
    assert (target.num_running, target.num_waiting) == (0, 0)
    assert order == sorted(order)
