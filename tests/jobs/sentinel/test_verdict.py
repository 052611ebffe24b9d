"""Who is wrong, from what ranks have shown: whoever contradicts what most say."""

from dataclasses import replace

import pytest

from jobs.exact.audits.audit import Audit, Shown
from jobs.exact.audits.excerpt import Repeated, ShownSum
from jobs.sentinel.verdict import (
    Corruption,
    Turn,
    Undecided,
    What,
    disputed_turns,
    most_common,
    named_later,
    of_copies,
    of_repeated,
    of_self_tests,
    of_turns,
)
from raymill.state.span import Span

RIGHT, WRONG, OTHER = 7, 8, 9
ONE_COPY_EACH = [[0, 0, 0], [0, 0, 0]]
BLOCKS = Span(0, 16)


def shown(*, own: int = RIGHT, other: int = RIGHT, values: int = 1, vectors: int = 2) -> Shown:
    return Shown(own, other, values, vectors)


def test_ranks_that_agree_dispute_nothing() -> None:
    audit = Audit(turns=[0, 1, 0], subjects=[1, 2, 0])
    assert disputed_turns(audit, [shown()] * 3) == []
    assert of_copies([shown()] * 3, holders=ONE_COPY_EACH).is_clean


@pytest.mark.parametrize(
    ("rows", "answers", "rank", "repeats"),
    [
        # Rank 1's own turn, which rank 0 computes too
        ([shown(), shown(own=WRONG), shown()], [RIGHT, RIGHT, RIGHT], 1, False),
        ([shown(), shown(own=WRONG), shown()], [RIGHT, WRONG, RIGHT], 1, True),
        ([shown(), shown(own=WRONG), shown()], [RIGHT, OTHER, RIGHT], 1, True),
        # The one that computes it again is wrong
        ([shown(other=WRONG), shown(), shown()], [RIGHT, RIGHT, RIGHT], 0, False),
        # Of two workers, the one that repeats itself is right
        ([shown(), shown(own=WRONG)], [RIGHT, OTHER], 1, True),
        ([shown(), shown(own=WRONG)], [RIGHT, RIGHT], 1, False),
    ],
)
def test_a_disputed_turn_is_decided_by_what_most_say(
    rows: list[Shown], answers: list[int], rank: int, repeats: bool
) -> None:
    size = len(rows)
    audit = Audit(turns=[3] * size, subjects=[(number + 1) % size for number in range(size)])
    disputed = disputed_turns(audit, rows)
    assert disputed == [Turn(1, 3)]
    verdict = of_turns(audit, rows, disputed, [answers])
    [corruption] = verdict.corruptions
    assert (corruption.rank, corruption.repeats, corruption.right) == (rank, repeats, RIGHT)
    assert not verdict.undecided


def test_two_workers_that_each_repeat_their_answer_cannot_be_told_apart() -> None:
    audit, rows = Audit(turns=[0, 0], subjects=[1, 0]), [shown(), shown(own=WRONG)]
    verdict = of_turns(audit, rows, disputed_turns(audit, rows), [[RIGHT, WRONG]])
    assert verdict.undecided == [Undecided(What.GRADIENT, {1: WRONG, 0: RIGHT})]
    assert not verdict.corruptions


def test_a_turn_that_stays_open__leaves_the_next_one_to_be_decided() -> None:
    audit, rows = Audit(turns=[0, 0], subjects=[1, 0]), [shown(own=WRONG), shown(own=WRONG)]
    disputed = disputed_turns(audit, rows)
    assert disputed == [Turn(0, 0), Turn(1, 0)]
    verdict = of_turns(audit, rows, disputed, [[WRONG, RIGHT], [RIGHT, RIGHT]])
    assert verdict.undecided == [Undecided(What.GRADIENT, {0: WRONG, 1: RIGHT})]
    assert [(at.rank, at.turn) for at in verdict.corruptions] == [(1, Turn(1, 0))]


def test_a_copy_that_differs_from_the_others_is_wrong() -> None:
    rows = [shown(), shown(values=5), shown(vectors=6)]
    found = of_copies(rows, holders=ONE_COPY_EACH).corruptions
    assert [(at.what, at.rank, at.shown, at.right) for at in found] == [
        (What.WEIGHTS, 1, 5, 1),
        (What.VECTORS, 2, 6, 2),
    ]


def test_only_ranks_that_hold_the_same_part_are_compared() -> None:
    rows = [shown(vectors=1), shown(vectors=2), shown(vectors=1), shown(vectors=2)]
    assert of_copies(rows, holders=[[0, 0, 0, 0], [0, 1, 0, 1]]).is_clean
    assert not of_copies(rows, holders=[[0, 0, 0, 0], [0, 0, 0, 0]]).is_clean


def test_of_two_copies_the_steps_taken_again_name_the_wrong_one() -> None:
    rows = [shown(values=5), shown(values=1)]
    verdict = of_copies(rows, holders=[[0, 0], [0, 0]])
    assert verdict.undecided == [Undecided(What.WEIGHTS, {0: 5, 1: 1})]
    [corruption] = named_later(What.WEIGHTS, {0: 5, 1: 1}, [shown(), shown()])
    assert (corruption.rank, corruption.shown, corruption.right) == (0, 5, 1)
    later = [shown(values=7), shown(values=7)]
    assert named_later(What.WEIGHTS, {0: 5, 1: 1}, later) == [], "one has made the other one wrong"
    assert named_later(What.WEIGHTS, {0: 5, 1: 1}, [shown()]) == [], "rank 1 is gone"


@pytest.mark.parametrize(
    ("hashes", "kinds", "wrong", "undecided"),
    [
        (["a", "a", "a"], "xxx", [], 0),
        (["a", "b", "a"], "xxx", [1], 0),
        (["a", "", "a"], "xxx", [1], 0),  # it failed
        (["", "a"], "xx", [0], 0),
        (["a", "b"], "xx", [], 1),
        (["a", "b"], "xy", [], 0),  # unlike hardware promises nothing
        (["a", "b", "c", "c", "d"], "xxyyy", [4], 1),  # each kind has a verdict of its own
        (["", ""], "xx", [0, 1], 0),
    ],
)
def test_self_tests_of_equal_hardware_must_agree(
    hashes: list[str], kinds: str, wrong: list[int], undecided: int
) -> None:
    verdict = of_self_tests(hashes, [*kinds])
    assert [corruption.rank for corruption in verdict.corruptions] == wrong
    assert len(verdict.undecided) == undecided


def test_a_self_test_that_differs__is_shown_by_its_hash_and_counts_as_repeated() -> None:
    [corruption] = of_self_tests(["a1", "b2", "a1"], [*"xxx"]).corruptions
    assert corruption == Corruption(What.SELF_TEST, 1, 0xB2, 0xA1, repeats=True, votes=(2, 1))


@pytest.mark.parametrize(
    ("answers", "expected"), [([1], 1), ([1, 2], None), ([1, 2, 1], 1), ([1, 1, 2, 2, 3], None)]
)
def test_the_most_common_answer_is_one_that_no_other_equals(
    answers: list[int], expected: int | None
) -> None:
    assert most_common(answers) == expected


def noted(
    rank: int, lanes: range, *, span: Span = BLOCKS, checksum: int = RIGHT, is_last: bool = False
) -> ShownSum:
    return ShownSum(rank, lanes, span, is_last, checksum)


def test_sums_that_all_add_up_alike_are_clean() -> None:
    sums = Repeated([noted(0, range(2)), noted(1, range(2, 4))], [[RIGHT] * 3, [RIGHT] * 3])
    assert of_repeated(What.SUM, sums).is_clean


@pytest.mark.parametrize(
    ("wrong", "rank"),
    [
        # Its own lanes, so the sum of all is wrong too, which rank 0 makes, and everybody's copy
        ([noted(1, range(2, 4)), noted(0, range(4))], 1),
        ([noted(0, range(4)), noted(2, range(4), is_last=True)], 0),
        ([noted(2, range(4), is_last=True)], 2),
        ([noted(1, range(4), span=Span(0, 8)), noted(1, range(4), is_last=True)], 1),
    ],
)
def test_the_first_wrong_sum_is_to_blame(wrong: list[ShownSum], rank: int) -> None:
    shown = [replace(one, checksum=WRONG) for one in wrong]
    verdict = of_repeated(What.SUM, Repeated(shown, [[RIGHT] * 3 for _ in shown]))
    [corruption] = verdict.corruptions
    assert (corruption.what, corruption.rank) == (What.SUM, rank)
    assert (corruption.shown, corruption.right, corruption.repeats) == (WRONG, RIGHT, False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (noted(0, range(2), span=Span(0, 8)), noted(1, range(4), span=Span(8, 16))),
        (noted(0, range(2)), noted(1, range(4, 8))),
    ],
)
def test_wrong_sums_at_different_places_have_different_culprits(
    first: ShownSum, second: ShownSum
) -> None:
    shown = [replace(first, checksum=WRONG), replace(second, checksum=WRONG)]
    verdict = of_repeated(What.SUM, Repeated(shown, [[RIGHT] * 3, [RIGHT] * 3]))
    assert [corruption.rank for corruption in verdict.corruptions] == [0, 1]


@pytest.mark.parametrize(
    ("checksum", "answers", "rank", "repeats"),
    [
        (WRONG, [RIGHT, WRONG, RIGHT], 1, True),
        (WRONG, [RIGHT, OTHER, RIGHT], 1, True),
        (RIGHT, [RIGHT, RIGHT, WRONG], 2, False),  # when it added up again
        (RIGHT, [RIGHT, WRONG, RIGHT], 1, False),
    ],
)
def test_who_adds_up_wrong_once_more_repeats_it(
    checksum: int, answers: list[int], rank: int, *, repeats: bool
) -> None:
    verdict = of_repeated(What.SUM, Repeated([noted(1, range(2), checksum=checksum)], [answers]))
    [corruption] = verdict.corruptions
    assert (corruption.rank, corruption.repeats) == (rank, repeats)


def test_two_that_add_up_differently_cannot_be_told_apart() -> None:
    verdict = of_repeated(What.SUM, Repeated([noted(1, range(2))], [[RIGHT, WRONG]]))
    assert not verdict.corruptions
    assert verdict.undecided == [Undecided(What.SUM, {0: RIGHT, 1: WRONG})]


def test_of_several_open_sums__the_first_is_told__beside_those_that_are_decided() -> None:
    sums = [noted(1, range(2)), noted(0, range(2, 4)), noted(1, range(4, 6), checksum=WRONG)]
    answers = [[RIGHT, WRONG], [OTHER, RIGHT], [RIGHT, RIGHT]]
    verdict = of_repeated(What.SUM, Repeated(sums, answers))
    assert verdict.undecided == [Undecided(What.SUM, {0: RIGHT, 1: WRONG})]
    assert [corruption.rank for corruption in verdict.corruptions] == [1]
