"""Tells whether a signed checkpoint is too old to be taken.

A signature says what a checkpoint is, and not that it is the newest one. Whoever writes to a storage
can offer an older one that is signed as well. Against that a floor is named: the earliest step, or
the earliest time of the signature. Both are read from the signed statement.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

_EXPECTED = "expected a day or a time in UTC, such as 2026-01-31 or 2026-01-31T12:00"
_STEP, _DATE = "storage.signed_from_step", "storage.signed_from_date"


@dataclass(frozen=True)
class Floor:
    """The earliest signed checkpoint that is taken: None is no bound."""

    step: int | None = None
    signed_on: datetime | None = None  # in UTC

    def problem(self, training: dict[str, Any]) -> str:
        """Returns why a checkpoint is not taken whose signed statement has this predicate; it
        continues the checkpoint's name, and is empty where nothing is wrong. A folder that
        transformers saved states nothing."""
        if self == NO_FLOOR:
            return ""
        if not training:
            return (
                f"states neither a step nor a date, as transformers saved it, and {self._asked} is set: name a "
                "checkpoint of raymill's, or leave the setting out"
            )
        about = training["runDetails"]["metadata"]
        return self._problem_of_step(about) or self._problem_of_date(about)

    @property
    def _asked(self) -> str:
        return _DATE if self.step is None else _STEP

    def _problem_of_step(self, about: dict[str, Any]) -> str:
        if self.step is None or int(about["step"]) >= self.step:
            return ""
        return (
            f"is of step {about['step']}, and {_STEP} asks for step {self.step} or a later one: name a newer "
            "checkpoint, or an earlier step there if this one is wanted"
        )

    def _problem_of_date(self, about: dict[str, Any]) -> str:
        if self.signed_on is None:
            return ""
        wanted = f"{_DATE} asks for {self.signed_on.isoformat()} or later"
        if "signedOn" not in about:
            return (
                f"does not state when it was signed, as an earlier raymill signed it, and {wanted}: sign it again "
                "with `raymill sign`, or leave the setting out"
            )
        if utc_time(about["signedOn"]) >= self.signed_on:
            return ""
        return (
            f"was signed on {about['signedOn']}, and {wanted}: sign it again with `raymill sign` if it is still "
            "wanted, or name an earlier date there"
        )


NO_FLOOR = Floor()


def utc_time(value: object) -> datetime:
    """Returns the time in UTC that a text in ISO 8601, a date or a time of YAML means: without a
    zone it is UTC, and a day means its beginning. Raises `ValueError`."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is no date: {_EXPECTED}") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError(f"{value!r} is no date: {_EXPECTED}")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
