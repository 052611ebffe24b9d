"""The batch's schedule: samples end to end, a batch that only grows, and a number of tokens that is
never exceeded."""

import time

from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.batch_schedule import BatchSchedule


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    """Draws schedules of at least one step, as settings must have."""
    start_lanes, lane_size, seq_len = (draw(st.integers(1, 12)) for _ in range(3))
    full_lanes, ramp_tokens = start_lanes + draw(st.integers(0, 40)), draw(st.integers(0, 20_000))
    first_lanes = start_lanes if ramp_tokens else full_lanes
    return BatchSchedule(
        seq_len=seq_len,
        lane_size=lane_size,
        full_lanes=full_lanes,
        max_tokens=first_lanes * lane_size * seq_len + draw(st.integers(0, 30_000)),
        start_lanes=start_lanes,
        ramp_tokens=ramp_tokens,
    )


def step_by_step(schedule: BatchSchedule) -> list[int]:
    """The lanes of each step, by the definition: linear in the tokens seen before, rounded down;
    one step beyond."""
    lanes, tokens = [], 0
    while tokens <= schedule.max_tokens:
        share = tokens / schedule.ramp_tokens if tokens < schedule.ramp_tokens else 1.0
        due = schedule.start_lanes + (schedule.full_lanes - schedule.start_lanes) * share
        lanes.append(int(due + 1e-9))
        tokens += lanes[-1] * schedule.lane_size * schedule.seq_len
    return lanes


@given(schedule=schedules())
def test_every_step_is_as_the_definition_says(schedule: BatchSchedule) -> None:
    expected = step_by_step(schedule)
    steps = range(1, len(expected) + 1)
    assert [schedule.num_lanes(step) for step in steps] == expected
    assert schedule.lane_counts == sorted(set(expected[:-1]))
    assert len(schedule.stages) <= schedule.full_lanes - schedule.start_lanes + 1


@given(schedule=schedules())
def test_batches_follow_each_other_and_never_shrink(schedule: BatchSchedule) -> None:
    end = 0
    for step in range(1, schedule.max_steps + 2):
        batch = schedule.samples(step)
        assert batch.start == end
        assert len(batch) == schedule.num_lanes(step) * schedule.lane_size
        assert step == 1 or schedule.num_lanes(step) >= schedule.num_lanes(step - 1)
        if schedule.tokens_seen(step - 1) >= schedule.ramp_tokens:
            assert schedule.num_lanes(step) == schedule.full_lanes
        assert {schedule.step_of(sample) for sample in batch} == {step}
        end = batch.stop
        assert schedule.tokens_seen(step) == end * schedule.seq_len
        assert schedule.tokens_seen(step) - schedule.tokens_seen(step - 1) == schedule.step_tokens(
            step
        )
        assert schedule.samples_of(1, step) == range(end)


@given(schedule=schedules())
def test_the_tokens_are_used_up_and_never_exceeded(schedule: BatchSchedule) -> None:
    steps = schedule.max_steps
    assert steps >= 1
    assert schedule.tokens_seen(steps) <= schedule.max_tokens < schedule.tokens_seen(steps + 1)


@given(
    lanes=st.integers(1, 64),
    size=st.integers(1, 9),
    length=st.integers(1, 64),
    max_tokens=st.integers(1, 10**12),
)
def test_without_a_ramp_it_is_multiplication(
    lanes: int, size: int, length: int, max_tokens: int
) -> None:
    schedule = BatchSchedule(
        seq_len=length, lane_size=size, full_lanes=lanes, max_tokens=max_tokens, start_lanes=lanes
    )
    batch = lanes * size
    assert schedule.max_steps == max_tokens // (batch * length)
    for step in (1, 2, 1000, 10**9):
        assert schedule.samples(step) == range((step - 1) * batch, step * batch)
        assert (schedule.tokens_seen(step), schedule.step_tokens(step)) == (
            step * batch * length,
            batch * length,
        )


def test_a_long_ramp_costs_its_stages_and_not_its_steps() -> None:
    """GPT-3's: from 32k tokens to 3.2M over 12B; and a ramp of a million steps."""
    gpt3 = BatchSchedule(
        seq_len=2048,
        lane_size=1,
        full_lanes=1600,
        max_tokens=300_000_000_000,
        start_lanes=16,
        ramp_tokens=12_000_000_000,
    )
    start = time.process_time()
    assert 95_000 < gpt3.max_steps < 115_000
    assert gpt3.tokens_seen(gpt3.max_steps) <= 300_000_000_000
    long = BatchSchedule(
        seq_len=1,
        lane_size=1,
        full_lanes=100,
        max_tokens=10**8,
        start_lanes=50,
        ramp_tokens=75 * 10**6,
    )
    assert long.max_steps > 10**6
    assert sum(long.samples(step).stop for step in range(10**6, 10**6 + 1000))
    assert time.process_time() - start < 0.5
