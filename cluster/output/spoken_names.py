"""Names the values of a result in people's words; with --json they keep the names that programs
know."""

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "backend": "kind of job",
    "continue_with": "continue with",
    "is_estimate": "estimated",
    "max_cost": "budget",
    "lost_steps": "steps taken again",
    "nodes_left_out": "nodes left out",
    "not_proven_since": "not proven since step",
    "not_stored": "NOT STORED",
    "number": "submissions",
    "proven_to": "proven to step",
    "seconds_left": "seconds left",
    "recovery_s": "longest recovery (s)",
    "where": "place",
    "world_sizes": "workers by attempt",
}


def for_people(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the result under people's names, without what did not occur: reasons that dropped no
    document, and the submissions of a run that was started by hand."""
    values = dict(result)
    if (planned := values.pop("planned_steps", None)) is not None:
        values["step"] = f"{values['step']:,} of {planned:,}"
    if not values.get("number", 1):
        del values["number"]
    if isinstance(dropped := values.get("dropped"), dict):
        values["dropped"] = {reason: count for reason, count in dropped.items() if count} or "none"
    return {_NAMES.get(name, name): value for name, value in values.items()}
