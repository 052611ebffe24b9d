"""What comes to light the second time."""

import math
from typing import Any

import pytest

from jobs.sentinel.second_time import Recurrence, Taking, recurrence, unnamed, wrong_at_first
from jobs.sentinel.verdict import Corruption, Turn, Undecided, What

NODES = ["a", "b"]
RIGHT, WRONG, OTHER = 7, 8, 9
NAN = math.nan


def undecided(shown: dict[int, int], what: What = What.WEIGHTS) -> Undecided:
    return Undecided(what, shown)


def event(
    shown: dict[int, int],
    *,
    step: int = 6,
    what: What = What.WEIGHTS,
    nodes: list[str] = NODES,
    attempt: int = 1,
) -> dict[str, Any]:
    return {
        "event": "undecided",
        "step": step,
        "attempt": attempt,
        "what": what.value,
        "shown": {str(rank): f"{checksum:016x}" for rank, checksum in shown.items()},
        "nodes": {str(rank): nodes[rank] for rank in shown},
        "to_step": 3,
    }


def known(at: Undecided, *earlier: dict[str, Any]) -> Recurrence:
    return recurrence(6, [at], nodes=NODES, earlier=[*earlier, {"step": 6}])


SAME = {0: RIGHT, 1: WRONG}


def test_two_that_repeat_their_contradiction_do_not_go_back_again() -> None:
    assert known(undecided(SAME), event(SAME)).repeated == [undecided(SAME)]
    again = [event(SAME), start(3), event(SAME, attempt=2), start(3)]
    assert known(undecided(SAME), *again).repeated == [undecided(SAME)], "resumed"
    assert not known(undecided(SAME), event(SAME)).wrong


def test_who_alone_shows_something_else_than_before_is_wrong() -> None:
    [found] = known(undecided({0: RIGHT, 1: OTHER}), event(SAME)).wrong
    assert (found.rank, found.shown, found.right) == (1, OTHER, RIGHT)
    assert found.repeats, "it was wrong each time"
    [found] = known(undecided({0: OTHER, 1: WRONG}), event(SAME)).wrong
    assert (found.rank, found.shown, found.right) == (0, OTHER, WRONG)


@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [event(SAME, step=5)],
        [event(SAME, what=What.VECTORS)],
        [event(SAME, nodes=["a", "c"])],
        [event({0: OTHER, 1: RIGHT})],  # both have changed
        [event(SAME), event(SAME, step=9, attempt=2)],  # the last time it was elsewhere
        # All hold what rank 0 had stored at step 5
        [event(SAME), {"event": "start", "step": 3}, {"event": "start", "step": 5}],
    ],
)
def test_what_was_not_there_before_sends_the_run_back(earlier: list[dict[str, Any]]) -> None:
    found = known(undecided(SAME), *earlier)
    assert not found.wrong
    assert not found.repeated


def test_weights_and_vectors_of_one_time_are_told_apart() -> None:
    lines = [event(SAME), event({0: 1, 1: 2}, what=What.VECTORS)]
    both = [undecided(SAME), undecided({0: 1, 1: 2}, What.VECTORS)]
    assert recurrence(6, both, nodes=NODES, earlier=lines).repeated == both


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "step": step}


def test_steps_taken_again_name_who_was_wrong_unless_a_later_checkpoint_took_their_place() -> None:
    undecided = event(SAME)
    assert unnamed([undecided, start(3)], 6) == [undecided]
    assert unnamed([undecided, start(3), start(0), {"step": 5}], 6) == [undecided]
    assert unnamed([undecided, start(3)], 7) == []
    assert unnamed([undecided, start(3), start(5)], 6) == [], "all hold what rank 0 had stored"
    assert unnamed([undecided, start(3), {"event": "named"}], 6) == []
    assert unnamed([event(SAME, what=What.SNAPSHOTS), start(3)], 6) == [], "no rank has shown that"
    assert unnamed([], 6) == []


def taking(
    *, loss: float = 3.0, losses: tuple[float, ...] = (1.0, 2.0), answers: tuple[int | None, ...]
) -> Taking:
    return Taking((loss, 0.5, 8), [[one] for one in losses], answers)


AGAIN = taking(answers=(RIGHT, RIGHT))


def test_figures_are_compared_by_their_bits_and_one_nan_is_as_good_as_another() -> None:
    first = taking(loss=NAN, answers=(None, None))
    assert first.repeats(taking(loss=-NAN, answers=(None, None)))
    assert not first.repeats(AGAIN)
    assert not taking(loss=0.0, answers=()).repeats(taking(loss=-0.0, answers=()))


def test_a_checksum_or_a_loss_of_the_first_time_shows_who_was_wrong() -> None:
    assert wrong_at_first(taking(loss=NAN, answers=(None, None)), AGAIN) == []
    [found] = wrong_at_first(taking(loss=NAN, answers=(RIGHT, WRONG)), AGAIN)
    assert found == Corruption(
        What.GRADIENT, 1, WRONG, RIGHT, repeats=False, turn=Turn(1, None), votes=(2, 1)
    )
    [found] = wrong_at_first(taking(losses=(NAN, 2.0), answers=(None, None)), AGAIN)
    assert (found.what, found.rank, found.repeats) == (What.LOSS, 0, False)
    assert found.right == 0x3FF0_0000_0000_0000, "1.0"


def test_a_loss_that_is_no_number_each_time_is_nobodys_fault() -> None:
    again = taking(losses=(NAN, 2.0), answers=(RIGHT, RIGHT))
    assert wrong_at_first(taking(losses=(-NAN, 2.0), answers=(None, None)), again) == []
