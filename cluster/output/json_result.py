"""Answers of commands: values that are their own JSON."""

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class JsonResult:
    """A frozen dataclass whose fields have the names and the order of its JSON."""

    def json(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def finite(value: float) -> float | None:
    """Returns a figure as JSON can have it."""
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    match value:
        case JsonResult():
            return value.json()
        case list():
            return [_plain(part) for part in value]
        case float():
            return finite(value)
        case _:
            return value
