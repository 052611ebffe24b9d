"""The arithmetic of a quota: what a bucket admits, for how long it makes a key wait, and when it is
full again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.limits.token_bucket import Debt, Quota

QUOTA = Quota(amount=600, window_s=60.0)  # 10 a second
WAITS = st.floats(0, 100)
AMOUNTS = st.integers(1, 600)


def test_a_full_bucket_gives_all_at_once_and_then_its_rate() -> None:
    debt = Debt(now_s=0.0)
    assert QUOTA.wait_s(debt.left_s(0.0), 600) == 0
    debt.add(QUOTA.seconds_of(600), now_s=0.0)
    assert QUOTA.wait_s(debt.left_s(0.0), 1) == pytest.approx(0.1)
    assert QUOTA.wait_s(debt.left_s(30.0), 300) == 0
    assert QUOTA.wait_s(debt.left_s(30.0), 400) == pytest.approx(10.0)
    assert QUOTA.wait_s(debt.left_s(1e9), 600) == 0


def test_what_is_larger_than_the_bucket_never_fits() -> None:
    assert math.isinf(QUOTA.wait_s(0.0, 601))


def test_what_is_given_back_makes_no_bucket_more_than_full() -> None:
    debt = Debt(now_s=0.0)
    debt.add(10.0, now_s=0.0)
    debt.add(-25.0, now_s=1.0)
    assert debt.left_s(1.0) == 0
    debt.add(5.0, now_s=1.0)
    assert debt.left_s(1.0) == 5


@given(st.lists(st.tuples(WAITS, AMOUNTS), max_size=40))
def test_a_bucket_admits_no_more_than_its_size_and_its_rate_in_any_stretch_of_time(
    asks: list[tuple[float, int]],
) -> None:
    debt, now_s = Debt(now_s=0.0), 0.0
    admitted: list[tuple[float, int]] = []
    for wait_s, amount in asks:
        now_s += wait_s
        if QUOTA.wait_s(debt.left_s(now_s), amount) == 0:
            debt.add(QUOTA.seconds_of(amount), now_s=now_s)
            admitted.append((now_s, amount))
    for first, (start_s, _) in enumerate(admitted):
        total = 0
        for at_s, amount in admitted[first:]:
            total += amount
            assert total <= 600 + 10 * (at_s - start_s) + 1e-6


@given(st.floats(0, 200), AMOUNTS)
def test_the_wait_that_is_told_is_enough_and_no_longer_than_needed(
    debt_s: float, amount: int
) -> None:
    debt = Debt(debt_s, now_s=0.0)
    wait_s = QUOTA.wait_s(debt.left_s(0.0), amount)
    assert QUOTA.wait_s(debt.left_s(wait_s + 1e-6), amount) == 0
    if wait_s > 0.1:
        assert QUOTA.wait_s(debt.left_s(wait_s - 0.1), amount) > 0


@given(st.lists(st.tuples(WAITS, st.floats(-30, 30)), max_size=40))
def test_a_debt_is_what_was_added_less_the_time_that_has_passed_from_zero_on(
    changes: list[tuple[float, float]],
) -> None:
    debt, now_s, expected_s = Debt(now_s=0.0), 0.0, 0.0
    for wait_s, seconds in changes:
        now_s += wait_s
        debt.add(seconds, now_s=now_s)
        expected_s = max(0.0, max(0.0, expected_s - wait_s) + seconds)
        assert debt.left_s(now_s) == pytest.approx(expected_s, abs=1e-9)
