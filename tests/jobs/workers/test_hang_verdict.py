"""Who holds a round up: from where its workers stand, without any process."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

from jobs.workers.hang_verdict import Standing, verdict
from jobs.workers.watchdog import Hang, Health, Place
from raymill.workers.progress import name_of, range_of

TIMEOUT_S = 30.0


def standing(
    stood_s: float = 40.0, *, step: int = 7, is_waiting: bool = True, **messages: tuple[int, int]
) -> Standing:
    """`messages` has the begun and finished ones by the ranks that exchange: `all`, or their
    digits."""
    names = {
        name_of(range(4) if name == "all" else range_of([*map(int, name[1:])])): counts
        for name, counts in messages.items()
    }
    return Standing(3, Place.STEP, step, stood_s, 0.5, is_waiting, names)


IN_FIFTH = standing(all=(5, 4))
IN_SIXTH = standing(all=(6, 5))
AT_WORK = standing(is_waiting=False, all=(4, 4))


def judged(*standings: Standing, last: Hang | None = None) -> Hang | None:
    return verdict(standings, hang_timeout_s=TIMEOUT_S, last=last)


def ended(*standings: Standing, last: Hang | None = None) -> tuple[Health, list[int], list[int]]:
    hang = judged(*standings, last=last)
    assert hang is not None
    assert Hang.from_json(json.loads(json.dumps(asdict(hang)))) == hang
    return hang.health, hang.ranks, hang.ended


def test_one_in_its_own_work_that_all_others_wait_for_is_ended() -> None:
    assert ended(IN_FIFTH, IN_FIFTH, AT_WORK, IN_FIFTH) == (Health.STUCK, [2], [2])


def test_one_that_is_behind_in_its_message_is_ended() -> None:
    hang = judged(IN_SIXTH, IN_FIFTH, IN_SIXTH, IN_SIXTH)
    assert hang is not None
    assert (hang.health, hang.ended, hang.seconds, hang.step) == (Health.BEHIND, [1], 40.0, 7)
    assert (
        hang.reason
        == "rank 1 was furthest back, in a message that all others had behind them or waited for"
    )


def test_two_in_the_same_message_are_named_and_end_the_round_alone() -> None:
    hang = judged(IN_FIFTH, IN_SIXTH, IN_SIXTH, IN_FIFTH)
    assert hang is not None
    assert (hang.health, hang.ranks, hang.ended) == (Health.BLOCKED, [0, 3], [])
    assert hang.reason.startswith("ranks 0, 3 stood still, none behind the others")
    assert hang.reason.endswith("all meet again")


def test_who_is_blocked_again_at_the_same_step_loses_one_suspect_after_the_other() -> None:
    where = [IN_FIFTH, IN_SIXTH, IN_SIXTH, IN_FIFTH]
    last = judged(*where)
    victims = []
    for _ in range(3):
        last = judged(*where, last=last)
        assert last is not None
        victims += last.ended
    assert victims == [3, 0, 3]
    further = [replace(one, step=20) for one in where]
    assert ended(*further, last=last) == (Health.BLOCKED, [0, 3], [])


def test_one_that_waits_for_a_blocked_one_is_no_suspect() -> None:
    """Rank 0 and 1 are blocked in their group; their counterparts 2 and 3 wait for them, one
    another's group for these."""
    assert ended(
        standing(t01=(5, 4), t02=(2, 2)),
        standing(t01=(5, 4), t13=(2, 2)),
        standing(t23=(6, 5), t02=(3, 2)),
        standing(t23=(6, 5), t13=(3, 2)),
    ) == (Health.BLOCKED, [0, 1], [])


def test_groups_with_more_messages_are_not_taken_for_further_ones() -> None:
    """A group of more lanes has more messages of its own: only those of the same ranks are
    compared."""
    group = [
        standing(t01=(50, 50), t02=(3, 2)),
        standing(is_waiting=False, t01=(50, 50), t13=(2, 2)),
    ]
    others = [standing(t23=(20, 20), t02=(3, 2)), standing(t23=(20, 20), t13=(3, 2))]
    assert ended(*group, *others) == (Health.STUCK, [1], [1])


def test_all_in_their_own_work_or_each_held_up_by_another_end_the_round_alone() -> None:
    assert ended(AT_WORK, AT_WORK, AT_WORK) == (Health.BLOCKED, [0, 1, 2], [])
    ahead_of_1, ahead_of_2 = standing(t01=(5, 4), t02=(1, 0)), standing(t12=(5, 4), t01=(4, 3))
    ahead_of_0 = standing(t02=(2, 1), t12=(4, 3))
    assert ended(ahead_of_1, ahead_of_2, ahead_of_0) == (Health.BLOCKED, [0, 1, 2], [])


@pytest.mark.parametrize("rank", range(4))
def test_nobody_is_blamed_while_one_moves(rank: int) -> None:
    """Or waits for storage, or gets ready: it then has not stood at all."""
    where = [IN_FIFTH, IN_FIFTH, AT_WORK, IN_FIFTH]
    where[rank] = replace(where[rank], stood_s=0.5)
    assert judged(*where) is None


@pytest.mark.parametrize(
    ("place", "is_waiting", "usual_step_s", "bound_s"),
    [
        (Place.STEP, True, 0.5, 30),
        (Place.STEP, True, 10.0, 50),
        (Place.SAVE, True, 0.5, 30),
        (Place.STEP, True, None, 30),  # nobody computes meanwhile, however long a step is
        (Place.FIRST_STEP, True, None, 120),  # whose messages connect
        (Place.AROUND, True, None, 120),
        (Place.STEP, False, 0.5, 37.5),  # a silent one is noticed first
        (Place.STEP, False, 10.0, 50),
        (Place.STEP, False, None, 300),
        (Place.FIRST_STEP, False, None, 300),  # compiles
        (Place.VALIDATION, False, 60.0, 1200),
    ],
)
def test_the_bound_of_each_place(
    place: Place, is_waiting: bool, usual_step_s: float | None, bound_s: float
) -> None:
    other = replace(IN_SIXTH, stood_s=5000.0, usual_step_s=usual_step_s)
    for stood_s, expected in ((bound_s - 1, False), (bound_s + 1, True)):
        one = replace(
            IN_FIFTH, place=place, is_waiting=is_waiting, usual_step_s=usual_step_s, stood_s=stood_s
        )
        hang = judged(one, other, other, other)
        assert (hang is not None) is expected, (stood_s, hang)


def test_512_ranks_are_judged_at_once_and_named_in_short() -> None:
    one = Standing(0, Place.STEP, 1, 40.0, 0.5, True, {name_of(range(512)): (9, 8)})
    hang = judged(*itertools.repeat(one, 512))
    assert hang is not None
    assert len(hang.ranks) == 8
    assert "and 504 more" in hang.reason
