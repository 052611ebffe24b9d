"""The decisions of a promotion, on reports alone."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.delivery.promotion import (
    Delivery,
    DeliveryError,
    Phase,
    ReplicaReport,
    SlotReport,
    SlotStatus,
    Terms,
    Version,
    advance,
    finish,
    roll_back,
    start,
)
from serving.delivery.route import Route
from serving.delivery.version_stats import VersionStats, step_times_at_like_load

OLD = Version(serial=1, checkpoint="/old", version="aa")
NEW = Version(checkpoint="/new", version="bb")
STEADY = Delivery(deployment="d", model_name="m", live=OLD)
READY = SlotReport(SlotStatus.READY)
TERMS = Terms(
    watch_s=10, max_loss_increase=0.1, max_error_rate=0.1, max_latency_ratio=2, load_timeout_s=100
)


def reports(*slots: dict[int, SlotReport], epoch: int = 1) -> list[ReplicaReport]:
    return [ReplicaReport(f"r{number}", epoch, found) for number, found in enumerate(slots)]


def step(state: Delivery, *slots: dict[int, SlotReport], elapsed_s: float = 0) -> Delivery:
    return advance(state, reports(*slots), elapsed_s=elapsed_s)


def loading(**terms: Any) -> Delivery:
    return start(STEADY, NEW, TERMS.model_copy(update=terms))


def watching() -> Delivery:
    state = step(loading(), {1: READY, 2: READY})
    assert state.phase is Phase.WATCHING
    return state


def named(run_id: str) -> Version:
    return Version(
        checkpoint=f"/runs/{run_id}/checkpoints/step-000000001",
        version=run_id,
        lineage={"run_id": run_id},
    )


def test_the_model_is_called_as_its_run_and_earlier_names_stay_valid() -> None:
    """A client that asks for `second` is served on after `third` and `fourth` were promoted."""
    state = Delivery(deployment="d", model_name="second", live=named("second"))
    for run_id in ("third", "fourth"):
        before = state.names
        state = start(state, named(run_id), TERMS)
        assert state.names == before, "what is still loading has served nobody"
        state = step(state, {1: READY, 2: READY, 3: READY})
        assert (state.phase, state.names[0]) == (Phase.WATCHING, run_id)
        state = step(state, {1: READY, 2: READY, 3: READY}, elapsed_s=11)
    assert (state.phase, state.names) == (Phase.STEADY, ["fourth", "second", "third"])
    refused = roll_back(start(state, named("fifth"), TERMS), "it does not load")
    assert refused.names == state.names
    canary = start(state, named("sixth"), TERMS.having(canary_percent=10.0))
    assert "sixth" in step(canary, {3: READY, 4: READY}).names
    assert Version(checkpoint="/models/gpt2/", version="x").name == "gpt2"


def test_no_replica_switches_before_all_have_loaded_the_candidate() -> None:
    state = loading()
    assert state.route == STEADY.route and [version.serial for version in state.needed] == [1, 2]
    assert state.serving == [OLD], "no client gets what is still being measured"
    for others in ({1: READY}, {1: READY, 2: SlotReport(SlotStatus.LOADING)}):
        assert step(state, {1: READY, 2: READY}, others) == state
    assert step(state) == state, "without replicas nothing is known"
    switched = step(state, {1: READY, 2: READY}, {1: READY, 2: READY})
    assert switched.phase is Phase.WATCHING and switched.epoch == state.epoch + 1
    assert switched.live.checkpoint == "/new" and switched.previous == OLD
    assert switched.needed == [switched.live, OLD], (
        "the old version stays loaded, so that it can return at once"
    )
    settled = step(switched, {2: READY}, elapsed_s=10)
    assert (
        settled.phase is Phase.STEADY
        and settled.needed == [switched.live]
        and settled.previous == OLD
    )
    assert settled.outcome is not None and settled.outcome.result == "promoted"
    assert settled.history == (settled.outcome,)


@pytest.mark.parametrize(
    ("slot", "reason"),
    [
        (SlotReport(SlotStatus.FAILED, "no numbers"), "no numbers"),
        (SlotReport(SlotStatus.READY, loss=math.nan, live_loss=3.0), "not a finite"),
        (SlotReport(SlotStatus.READY, loss=3.11, live_loss=3.0), "3.1100.*3.0000.*0.1"),
    ],
)
def test_a_candidate_that_one_replica_finds_bad_is_refused(slot: SlotReport, reason: str) -> None:
    refused = step(loading(), {1: READY, 2: READY}, {1: READY, 2: slot})
    assert (refused.phase, refused.live, refused.needed, refused.epoch) == (
        Phase.STEADY,
        OLD,
        [OLD],
        1,
    )
    assert refused.outcome is not None and refused.outcome.result == "refused"
    assert re.search(reason, refused.outcome.reason)


@pytest.mark.parametrize(
    ("loss", "live_loss"),
    [(3.09, 3.0), (None, 3.0), (9.0, None)],
    ids=["little worse", "not measured yet", "nothing to compare with"],
)
def test_a_loss_within_the_tolerance_passes_and_so_does_what_was_not_measured(
    loss: float | None, live_loss: float | None
) -> None:
    slot = SlotReport(SlotStatus.READY, loss=loss, live_loss=live_loss)
    assert step(loading(), {1: READY, 2: slot}).phase is Phase.WATCHING


def test_loading_has_a_limit() -> None:
    assert step(loading(), {1: READY}, elapsed_s=100).phase is Phase.LOADING
    assert step(loading(), {1: READY}, elapsed_s=101).phase is Phase.STEADY


def stats(
    sequences: int, *, errors: int = 0, s_per_token: float = 0.01, streams: int = 4
) -> SlotReport:
    """A replica's report on a version that has answered so many sequences, `streams` at a time."""
    counted = VersionStats(sequences, errors)
    for _ in range(10 * sequences // streams):
        counted.stepped(streams, s_per_token)
    return SlotReport(SlotStatus.READY, stats=counted)


@pytest.mark.parametrize("canary", [False, True])
@pytest.mark.parametrize(
    ("new", "stays"),
    [
        (stats(10, errors=2), True),
        (stats(10, errors=3), False),
        (stats(100, errors=10), True),
        (stats(100, errors=11), False),
        (SlotReport(SlotStatus.FAILED, "died"), False),
        (SlotReport(SlotStatus.READY, loss=3.09, live_loss=3.0), True),
        # Of a replica that has joined meanwhile
        (SlotReport(SlotStatus.READY, loss=3.11, live_loss=3.0), False),
        (stats(20, s_per_token=2 / 64), True),  # exactly twice as long
        (stats(20, s_per_token=0.0313), False),
        (stats(19, s_per_token=9), True),
    ],
)
def test_errors_and_slowness_roll_back(new: SlotReport, *, stays: bool, canary: bool) -> None:
    state = step(loading(canary_percent=10.0 if canary else None), {1: READY, 2: READY})
    assert state.phase is (Phase.CANARY if canary else Phase.WATCHING)
    after = step(state, {1: stats(500, s_per_token=1 / 64), 2: new}, elapsed_s=5)
    if stays:
        assert after == state
        return
    assert (after.phase, after.live, after.epoch) == (Phase.STEADY, OLD, state.epoch + 1)
    assert after.outcome is not None and after.outcome.result == "rolled_back"
    assert after.outcome.version.checkpoint == "/new"


@pytest.mark.parametrize(
    ("new", "stays"),
    [
        (stats(100, streams=16, s_per_token=0.04), True),  # steps of this size were not seen before
        (stats(100, streams=16, s_per_token=0.04, errors=50), False),
        (stats(100, streams=1, s_per_token=0.021), False),
        (stats(100, streams=1, s_per_token=0.019), True),
    ],
)
def test_a_version_is_compared_in_steps_of_like_size(new: SlotReport, *, stays: bool) -> None:
    """On the old code an equal model that was promoted at the start of a busy hour was rolled
    back."""
    after = step(watching(), {1: stats(500, streams=1), 2: new}, elapsed_s=5)
    assert (after.phase is Phase.WATCHING) is stays


def test_a_mixture_of_sizes_is_compared_with_the_same_mixture() -> None:
    old, new = VersionStats(), VersionStats()
    for streams, count_before, count_after in [(1, 900, 100), (16, 100, 900), (2, 5, 5)]:
        for counted, count in ((old, count_before), (new, count_after)):
            for _ in range(count):
                counted.stepped(streams, 0.01 if streams == 1 else 0.03)
    compared = step_times_at_like_load(new, old)
    assert compared is not None
    assert compared[0] == pytest.approx(compared[1])
    assert step_times_at_like_load(VersionStats(), old) is None


def test_what_a_dead_replica_saw_counts() -> None:
    seen = reports({2: stats(100, errors=50)})
    assert (
        advance(watching(), reports({1: READY, 2: READY}), gone=seen, elapsed_s=1).phase
        is Phase.STEADY
    )


@pytest.mark.parametrize("canary", [None, 10.0])
def test_weights_that_may_have_ended_the_only_engine_go(canary: float | None) -> None:
    """In any phase; not for a replica that had an engine for each version, has said that it leaves,
    or had older weights."""
    shared = SlotReport(SlotStatus.READY, in_place=True)
    states = [loading(canary_percent=canary)]
    states.append(step(states[0], {1: READY, 2: shared}))
    states.append(step(states[1], {1: READY, 2: shared}, elapsed_s=11))
    assert [state.phase for state in states] == [
        Phase.LOADING,
        *([Phase.CANARY] if canary else []),
        Phase.WATCHING,
        Phase.STEADY,
    ][:3]
    for state in states[: 3 if canary else 2]:
        present = reports({1: READY, 2: SlotReport(SlotStatus.LOADING, in_place=True)})
        for slots, is_leaving in [
            ({1: shared, 2: READY}, False),
            ({2: shared}, True),
            ({1: shared}, False),
        ]:
            gone = [ReplicaReport("gone", 1, slots, is_leaving=is_leaving)]
            assert advance(state, present, gone=gone, elapsed_s=1) == state
        after = advance(
            state, present, gone=[ReplicaReport("gone", 1, {1: READY, 2: shared})], elapsed_s=1
        )
        assert after.phase is Phase.STEADY and after.live == OLD
        assert after.outcome is not None and "gone has ended" in after.outcome.reason
        assert after.outcome.result == (
            "refused" if state.phase is Phase.LOADING else "rolled_back"
        )


def test_a_canary_becomes_live_by_itself_or_when_asked() -> None:
    canary = step(loading(canary_percent=25.0), {1: READY, 2: READY})
    assert canary.route == Route(epoch=2, primary=1, canary=2, percent=25)
    for state in (finish(canary), step(canary, {1: READY, 2: READY}, elapsed_s=10)):
        assert state.phase is Phase.WATCHING and state.route == Route(epoch=3, primary=2)


@pytest.mark.parametrize("percent", [0.0, 1.0, 10.0, 50.0, 100.0])
def test_a_canary_has_its_share_of_the_keys_and_keeps_them(percent: float) -> None:
    route = Route(epoch=2, primary=1, canary=2, percent=percent)
    given = {key: route.serial_for(key) for key in map(str, range(4000))}
    assert given == {key: route.serial_for(key) for key in given}
    share = percent / 100
    for serials in (list(given.values()), [route.serial_for(None) for _ in range(4000)]):
        assert abs(serials.count(2) / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


def test_a_rollback_ends_what_is_on_or_loads_the_version_before() -> None:
    assert roll_back(loading(), "why").needed == [OLD]
    ended = roll_back(watching(), "why")
    assert ended.route == Route(epoch=3, primary=1) and ended.previous is None
    with pytest.raises(DeliveryError, match="no earlier version"):
        roll_back(STEADY, "why")
    settled = step(watching(), {2: READY}, elapsed_s=10)
    returning = roll_back(settled, "why")
    assert returning.phase is Phase.LOADING and returning.candidate is not None
    assert returning.candidate.checkpoint == "/old" and returning.candidate.serial == 3
    returned = step(step(returning, {2: READY, 3: READY}), {2: READY, 3: READY})
    assert returned.phase is Phase.STEADY and returned.live.checkpoint == "/old"
    assert returned.previous is not None and returned.previous.checkpoint == "/new"


def test_terms_that_are_not_given_are_strict() -> None:
    state = start(STEADY, NEW, Terms(watch_s=10))
    for loss, phase in ((3.0, Phase.WATCHING), (3.01, Phase.STEADY)):
        measured = SlotReport(SlotStatus.READY, loss=loss, live_loss=3.0)
        assert step(state, {1: READY, 2: measured}).phase is phase
    assert step(state, {1: READY}, elapsed_s=600) == state
    assert step(state, {1: READY}, elapsed_s=601).phase is Phase.STEADY
    live = step(state, {1: READY, 2: READY})
    assert step(live, {2: stats(300, errors=3)}) == live, "a hundredth may fail"
    assert step(live, {2: stats(200, errors=3)}).live == OLD


def test_the_last_twenty_promotions_are_remembered() -> None:
    state = STEADY
    for number in range(21):
        state = roll_back(start(state, NEW, TERMS), f"reason {number}")
    reasons = [ended.reason for ended in state.history]
    assert reasons == [f"reason {number}" for number in range(1, 21)]


@pytest.mark.parametrize("name", ["epoch", "phase", "live"])
def test_a_state_never_changes_in_place(name: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(STEADY, name, getattr(loading(), name))


def test_what_was_refused_or_rolled_back_is_withdrawn_until_it_is_promoted() -> None:
    refused = step(loading(), {1: READY, 2: SlotReport(SlotStatus.FAILED, "bad")})
    assert refused.withdrawn == {NEW.version}
    promoted = step(start(refused, NEW, TERMS), {1: READY, 3: READY})
    assert promoted.phase is Phase.WATCHING and promoted.withdrawn == set(), "it is live"
    settled = step(promoted, {3: READY}, elapsed_s=10)
    assert settled.withdrawn == set()
    returning = roll_back(settled, "it is rude")
    assert returning.withdrawn == set(), "it serves until the version before is loaded"
    returned = step(step(returning, {3: READY, 4: READY}), {3: READY, 4: READY})
    assert returned.live.checkpoint == OLD.checkpoint and returned.withdrawn == {NEW.version}
    ends = [(ended.version.serial, ended.result, ended.reason) for ended in returned.history]
    assert ends[1:] == [(3, "promoted", ""), (3, "rolled_back", "it is rude"), (4, "promoted", "")]


def test_one_promotion_at_a_time() -> None:
    for state in (loading(), watching()):
        with pytest.raises(DeliveryError, match="is being promoted"):
            start(state, NEW, TERMS)
    for state in (STEADY, loading(), watching()):
        with pytest.raises(DeliveryError, match="no canary"):
            finish(state)


def test_a_coordinator_that_lost_its_last_decision_makes_a_newer_one() -> None:
    late, newer = reports({1: READY}), reports({1: READY}, epoch=7)
    assert advance(STEADY, [*late, *newer], elapsed_s=0).route == Route(epoch=8, primary=1)


EVENTS = st.lists(
    st.sampled_from(["promote", "canary", "finish", "rollback", "ready", "bad", "failing", "time"]),
    max_size=30,
)


@given(EVENTS)
def test_whatever_happens_somebody_serves(events: Sequence[str]) -> None:
    """The route leads to loaded versions only, epochs and serials never fall, and what is stored
    comes back."""
    state = STEADY
    for event in events:
        before = state
        everything = {version.serial: READY for version in state.needed}
        newest = max(everything)
        try:
            match event:
                case "promote" | "canary":
                    percent = 10.0 if event == "canary" else None
                    state = start(state, NEW, TERMS.model_copy(update={"canary_percent": percent}))
                case "finish":
                    state = finish(state)
                case "rollback":
                    state = roll_back(state, "why")
                case "ready":
                    state = step(state, everything)
                case "bad":
                    state = step(state, everything | {newest: SlotReport(SlotStatus.FAILED, "bad")})
                case "failing":
                    state = step(state, everything | {newest: stats(50, errors=50)})
                case "time":
                    state = step(state, everything, elapsed_s=1000)
        except DeliveryError:
            assert state == before
        loaded = {version.serial for version in state.needed}
        assert {state.route.primary, state.route.canary} <= loaded | {0}
        assert all(version in state.known for version in state.needed), (
            "what is loaded must not be deleted"
        )
        assert state.epoch >= before.epoch and state.last_serial >= before.last_serial
        if state.route.primary != before.route.primary:
            assert state.epoch > before.epoch
            assert {state.route.primary} <= {version.serial for version in before.needed}, (
                "nobody had loaded it"
            )
        assert Delivery.model_validate_json(state.model_dump_json()) == state
        assert Route.from_header(state.route.to_header()) == state.route


@pytest.mark.parametrize("text", ["", "1:2:3", "a:b:c:d", "1:2:3:4", "1:2:3:4:5:6"])
def test_what_is_no_route_is_none(text: str) -> None:
    assert Route.from_header(text) is None
