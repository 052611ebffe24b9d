"""A floor refuses signed checkpoints that are older than it, by what their statement says."""

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from model.signing.floor import NO_FLOOR, Floor, utc_time

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)


def statement(step: int = 30, **about: str) -> dict[str, Any]:
    return {"runDetails": {"metadata": {"step": str(step), **about}}}


@pytest.mark.parametrize("step", [0, 30])
def test_a_step_of_the_floor_or_later_is_taken(step: int) -> None:
    assert Floor(step=step).problem(statement(30)) == ""
    assert NO_FLOOR.problem(statement(30)) == NO_FLOOR.problem({}) == ""


def test_an_earlier_step_is_refused_with_both_numbers() -> None:
    said = Floor(step=100).problem(statement(30))  # as numbers: as texts 30 would be the greater
    assert said.startswith(
        "is of step 30, and storage.signed_from_step asks for step 100 or a later"
    )


@pytest.mark.parametrize(
    ("signed_on", "is_taken"),
    [
        ("2025-12-31T23:59:59+00:00", False),
        ("2026-01-01T00:00:00+00:00", True),
        ("2026-01-01T00:30:00+01:00", False),
    ],
)
def test_a_signature_before_the_floor_is_refused(signed_on: str, is_taken: bool) -> None:
    said = Floor(signed_on=NEW_YEAR).problem(statement(signedOn=signed_on))
    assert (said == "") is is_taken
    if not is_taken:
        assert f"was signed on {signed_on}" in said and "asks for 2026-01-01T00:00:00" in said


def test_a_statement_without_a_date_is_refused_where_one_is_asked_for() -> None:
    assert "does not state when it was signed" in Floor(signed_on=NEW_YEAR).problem(statement())
    assert Floor(step=30).problem(statement()) == ""


def test_both_bounds_count() -> None:
    floor = Floor(30, NEW_YEAR)
    assert floor.problem(statement(30, signedOn="2026-01-02T00:00:00+00:00")) == ""
    assert "is of step 29" in floor.problem(statement(29, signedOn="2026-01-02T00:00:00+00:00"))
    assert "was signed on" in floor.problem(statement(30, signedOn="2025-01-02T00:00:00+00:00"))


@pytest.mark.parametrize("floor", [Floor(step=0), Floor(signed_on=NEW_YEAR)])
def test_a_folder_that_states_nothing_is_refused(floor: Floor) -> None:
    assert "as transformers saved it" in floor.problem({})


@pytest.mark.parametrize(
    "value",
    [
        "2026-01-01",
        "2026-01-01T00:00",
        "2026-01-01T00:00:00Z",
        "2026-01-01T01:00+01:00",
        date(2026, 1, 1),  # as YAML reads one
        datetime(2026, 1, 1),
        datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_a_time_is_utc_unless_it_says_another_zone(value: object) -> None:
    assert utc_time(value) == NEW_YEAR


@pytest.mark.parametrize("value", ["yesterday", "2026-13-01", 20260101, True])
def test_what_is_no_date_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no date: expected a day or a time in UTC"):
        utc_time(value)
