"""Replicas and the coordinator sum up what keys use, whatever is lost between them and whoever
dies."""

import pickle
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.limits.key_usage import ALONE_S, KeyUsage
from serving.limits.token_bucket import Debt
from serving.limits.usage_board import LOST_S, UsageBoard
from serving.limits.usage_report import Account, QuotaKind

ALICE = Account("alice", QuotaKind.TOKENS_PER_MINUTE)


@dataclass
class World:
    """Replicas and their coordinator, on one clock."""

    now_s: float = 100.0
    board: UsageBoard = field(init=False)
    replicas: dict[str, KeyUsage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The coordinator dies, and another one starts."""
        self.board = UsageBoard(clock=lambda: self.now_s)

    def start(self, *names: str) -> list[KeyUsage]:
        for name in names:
            self.replicas[name] = KeyUsage(clock=lambda: self.now_s)
            self.exchange(name)
        return [self.replicas[name] for name in names]

    def exchange(self, *names: str, answer_is_lost: bool = False) -> None:
        for name in names:
            report = self.replicas[name].report()
            answer = pickle.loads(
                pickle.dumps(self.board.exchange(name, pickle.loads(pickle.dumps(report))))
            )
            if not answer_is_lost:
                self.replicas[name].adopt(answer, report, asked_at_s=self.now_s)


def test_each_replica_knows_the_running_requests_of_the_others() -> None:
    world = World()
    a, b, c = world.start("a", "b", "c")
    with a.running("alice"), a.running("alice"), b.running("alice"), b.running("bob"):
        world.exchange("a", "b", "c")
        world.exchange("a", "b", "c")
        assert [usage.num_elsewhere("alice") for usage in (a, b, c)] == [1, 2, 3]
        assert [usage.num_here("alice") for usage in (a, b, c)] == [2, 1, 0]
        assert c.num_elsewhere("bob") == 1 and c.num_elsewhere("nobody") == 0
    world.exchange("a", "b", "c")
    assert c.num_elsewhere("alice") == 0


def test_a_dead_replica_takes_its_running_requests_along_and_leaves_its_debts() -> None:
    world = World()
    a, b = world.start("a", "b")
    with a.running("alice"):
        a.charge(ALICE, 50.0)
        world.exchange("a", "b")  # the last report of a
    assert (b.num_elsewhere("alice"), b.debt_s(ALICE)) == (1, 50.0)
    world.now_s += LOST_S - 0.1
    world.exchange("b")
    assert b.num_elsewhere("alice") == 1
    world.now_s += 0.1
    world.exchange("b")
    assert (b.num_elsewhere("alice"), b.debt_s(ALICE)) == (0, pytest.approx(50.0 - LOST_S))


def test_a_coordinator_that_starts_anew_has_the_debts_back_with_the_first_report() -> None:
    world = World()
    a, b = world.start("a", "b")
    a.charge(ALICE, 30.0)
    b.charge(ALICE, 20.0)
    world.exchange("a", "b", "a")
    world.restart()
    world.now_s += 1
    world.exchange("b")
    assert b.debt_s(ALICE) == pytest.approx(49.0)
    [late] = world.start("late")
    assert late.debt_s(ALICE) == pytest.approx(49.0)
    world.exchange("a")
    assert a.debt_s(ALICE) == pytest.approx(49.0), "it is not added up again"


@pytest.mark.parametrize("num_lost", [1, 3])
def test_an_answer_that_is_lost_lets_nothing_be_charged_twice(num_lost: int) -> None:
    world = World()
    a, b = world.start("a", "b")
    for _ in range(num_lost):
        a.charge(ALICE, 5.0)
        world.exchange("a", answer_is_lost=True)
    a.charge(ALICE, 5.0)
    world.exchange("a", "b")
    assert a.debt_s(ALICE) == b.debt_s(ALICE) == 5.0 * (num_lost + 1)
    a.charge(ALICE, -2.0)
    world.exchange("a", "b")
    assert b.debt_s(ALICE) == 5.0 * (num_lost + 1) - 2


def test_a_report_that_was_overtaken_changes_nothing() -> None:
    world = World()
    a, b = world.start("a", "b")
    a.charge(ALICE, 5.0)
    late = a.report()
    a.charge(ALICE, 5.0)
    world.exchange("a")
    world.board.exchange("a", late)
    a.charge(ALICE, 1.0)
    world.exchange("a", "b")
    assert b.debt_s(ALICE) == 11


def test_what_is_charged_while_an_answer_is_under_way_is_not_lost() -> None:
    world = World()
    a, _ = world.start("a", "b")
    a.charge(ALICE, 5.0)
    report = a.report()
    answer = world.board.exchange("a", report)
    a.charge(ALICE, 7.0)
    a.adopt(answer, report, asked_at_s=world.now_s)
    assert a.debt_s(ALICE) == 12
    world.exchange("a", "b")
    assert world.replicas["b"].debt_s(ALICE) == 12


def test_a_replica_that_is_alone_gives_its_share_and_counts_for_all() -> None:
    world = World()
    a, b, c = world.start("a", "b", "c")
    with b.running("alice"):
        world.exchange("a", "b", "c", "a")
    assert (a.weight, a.share_of(8), a.num_elsewhere("alice")) == (1, 8, 1)
    world.now_s += ALONE_S
    assert (a.weight, a.share_of(8), a.num_elsewhere("alice")) == (3, 3, 0)
    for usage in (a, b, c):  # as busy as each other
        usage.charge(ALICE, usage.weight * 10.0)
    assert a.debt_s(ALICE) == 30
    world.restart()
    world.exchange("a", "b", "c")
    assert [usage.debt_s(ALICE) for usage in (a, b, c)] == [30, 30, 30]
    assert (a.weight, a.share_of(8)) == (1, 8)


def test_an_hour_alone_leaves_no_debt_of_an_hour() -> None:
    """The coordinator was there all the time, and could not be reached."""
    world = World()
    [a] = world.start("a")
    for _ in range(3600):
        a.charge(ALICE, 0.9)
        world.now_s += 1
        a.report()
    world.exchange("a")
    assert a.debt_s(ALICE) < 1
    a.charge(ALICE, 4.0)
    world.exchange("a")
    assert a.debt_s(ALICE) < 5


STEPS = st.tuples(
    st.integers(0, 3),  # replica
    st.floats(0, 20),  # seconds that it charges
    st.floats(0, 0.1),  # seconds that pass after it
    st.sampled_from(["reports", "is not answered", "is silent"]),
)


@given(st.lists(STEPS, max_size=60))
def test_the_sum_is_that_of_one_bucket_but_for_the_age_of_the_reports(
    steps: list[tuple[int, float, float, str]],
) -> None:
    """Never below what one bucket for all would have; above it by no more than the time that
    reports take."""
    names = ["a", "b", "c", "d"]
    world = World()
    world.start(*names)
    exact = Debt(now_s=world.now_s)
    oldest_s = dict.fromkeys(names, world.now_s)  # since when a replica has not reported
    longest_s = 0.0
    for number, seconds, passes_s, what in steps:
        name = names[number]
        usage = world.replicas[name]
        before_s = usage.debt_s(ALICE)
        usage.charge(ALICE, seconds)
        assert usage.debt_s(ALICE) == pytest.approx(before_s + seconds)
        exact.add(seconds, now_s=world.now_s)
        if what != "is silent":
            longest_s = max(longest_s, world.now_s - oldest_s[name])
            oldest_s[name] = world.now_s
            world.exchange(name, answer_is_lost=what == "is not answered")
        world.now_s += passes_s
        if world.now_s - min(oldest_s.values()) > ALONE_S / 2:  # nobody is alone here
            for late in names:
                longest_s = max(longest_s, world.now_s - oldest_s[late])
                oldest_s[late] = world.now_s
            world.exchange(*names)
    world.exchange(*names)
    world.exchange(*names)
    longest_s = max(longest_s, world.now_s - min(oldest_s.values()))
    exact_s = exact.left_s(world.now_s)
    for usage in world.replicas.values():
        assert exact_s - 1e-6 <= usage.debt_s(ALICE) <= exact_s + longest_s + 1e-6
