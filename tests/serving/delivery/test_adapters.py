"""The decisions about adapters with names of their own, on the endpoint's state alone."""

from collections.abc import Callable
from functools import partial
from itertools import count

import pytest

from serving.delivery.adapters import begin_adapters, continued, on_line
from serving.delivery.promotion import (
    MODEL,
    Delivery,
    DeliveryError,
    Phase,
    ReplicaReport,
    SlotReport,
    SlotStatus,
    Terms,
    Version,
    advance,
    roll_back,
    start,
)

READY = SlotReport(SlotStatus.READY)
TERMS = Terms(watch_s=10)
BASE = Delivery(deployment="d", model_name="m", live=Version(checkpoint="/base", version="base"))
NAMED = {"support": "runs/support", "sql": "runs/sql@2000"}


def adapter(place: str) -> Version:
    return Version(checkpoint=place, version=place, lineage={"run_id": "r", "base_hash": "base"})


def origins() -> Callable[[], str]:
    numbers = count()
    return lambda: f"origin-{next(numbers)}"


def begun(state: Delivery = BASE, named: dict[str, str] = NAMED) -> Delivery:
    versions = {name: adapter(f"/{name}/1") for name in named}
    return begin_adapters(state, named, versions, new_origin=origins())


def promoting(state: Delivery, name: str, *, num_places: int = 8) -> Delivery:
    order = partial(start, candidate=adapter(f"/{name}/2"), terms=TERMS)
    return on_line(name, order, num_places=num_places)(state)


def promoted(state: Delivery, name: str) -> Delivery:
    """After its watch window."""
    state = promoting(state, name)
    report = ReplicaReport("r", 1, {1: READY, 2: READY})
    for elapsed_s in (0, 11):
        line = advance(state.lines[name], [report], elapsed_s=elapsed_s)
        state = state.with_line(name, line)
    return state


def test_adapters_of_the_settings_begin_each_with_a_state_of_its_own() -> None:
    state = begun()
    assert list(state.lines) == [MODEL, "support", "sql"] and state.lines[MODEL] is state
    support, sql = state.adapters.values()
    assert (support.live.checkpoint, support.live.serial) == ("/support/1", 1)
    assert support.origin != sql.origin, "a route of one says nothing about the other"
    assert state.pinned == ["/base", "/support/1", "/sql/1"]
    assert begun(state) is state, "the first replica's word counts"


def test_promoting_one_adapter_changes_nothing_of_the_others() -> None:
    before = begun()
    state = promoted(before, "support")
    assert state.lines[MODEL].live == BASE.live and state.phase is Phase.STEADY
    assert state.adapters["sql"] == before.adapters["sql"]
    assert state.adapters["support"].live.checkpoint == "/support/2"
    assert state.adapters["support"].phase is Phase.STEADY
    assert state.pinned == ["/base", "/support/2", "/support/1", "/sql/1"]
    assert state.names == before.names, "an adapter's run is no name of the model"
    back = on_line("support", partial(roll_back, reason="why"), num_places=8)(state)
    assert back.adapters["support"].candidate is not None
    assert back.adapters["support"].candidate.checkpoint == "/support/1"


def test_two_adapters_may_be_promoted_at_a_time_but_none_twice() -> None:
    state = promoting(promoting(begun(), "support"), "sql")
    assert {line.phase for line in state.adapters.values()} == {Phase.LOADING}
    with pytest.raises(DeliveryError, match="/sql/2 is being promoted"):
        promoting(state, "sql")


def test_a_restart_goes_on_with_what_was_promoted_unless_the_settings_name_another_one() -> None:
    state = promoted(promoted(begun(), "support"), "sql")
    assert continued(state, NAMED) is state and begun(state) is state
    changed = {"support": "runs/support", "sql": "runs/sql@3000", "new": "runs/new"}
    left = continued(state, changed)
    assert left.pinned == ["/base", "/support/2", "/support/1"], "what is no longer named may go"
    state = begun(left, changed)
    assert {name: line.live.checkpoint for name, line in state.adapters.items()} == {
        "support": "/support/2",
        "sql": "/sql/1",
        "new": "/new/1",
    }
    assert state.adapters["sql"].deployment == "runs/sql@3000"


@pytest.mark.parametrize("model_is_adapter", [False, True])
def test_a_promotion_without_a_place_for_both_versions_is_refused(model_is_adapter: bool) -> None:
    live = adapter("/model/1") if model_is_adapter else BASE.live
    state = begun(BASE.having(live=live))
    num_places = 3 + model_is_adapter
    assert state.num_adapters == num_places - 1
    with pytest.raises(
        DeliveryError, match=f"for {num_places} adapters, and have {num_places - 1}"
    ):
        promoting(state, "support", num_places=num_places - 1)
    state = promoting(state, "support", num_places=num_places)
    assert state.num_adapters == num_places
    with pytest.raises(DeliveryError, match=r"set engine\.max_adapters to as many"):
        promoting(state, "sql", num_places=num_places)
    ended = on_line("support", partial(roll_back, reason="why"), num_places=0)(state)
    assert ended.num_adapters == num_places - 1, "what frees a place needs none"


def test_an_order_for_no_adapter_names_those_that_there_are() -> None:
    with pytest.raises(DeliveryError, match="'sqk'; this endpoint serves support, sql"):
        promoting(begun(), "sqk")
    with pytest.raises(DeliveryError, match=r"--adapters NAME=CHECKPOINT.*vLLM"):
        promoting(BASE, "support")
    with pytest.raises(DeliveryError, match="no earlier version to return to"):
        on_line("sql", partial(roll_back, reason="why"), num_places=8)(begun())


def test_what_the_operator_is_shown_has_no_rows_of_the_gate() -> None:
    order = partial(start, candidate=adapter("/2"), terms=TERMS.having(gate_rows=((1, 2, 3),)))
    shown = on_line("sql", order, num_places=8)(begun()).shown()
    assert shown["adapters"]["sql"]["candidate"]["checkpoint"] == "/2"
    assert "gate_rows" not in shown["adapters"]["sql"]["terms"]
