"""The one line of a stage's output that carries its result."""

import json
from typing import Any

RESULT_MARK = "raymill-result: "


def parse_result(line: str) -> dict[str, Any] | None:
    """The result that a line of a stage's output carries, if it is that line."""
    return json.loads(line[len(RESULT_MARK) :]) if line.startswith(RESULT_MARK) else None
