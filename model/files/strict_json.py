"""Reads JSON that every reader understands alike: UTF-8, no name twice in an object, only finite
numbers, not too deep."""

import json
from functools import cache
from typing import Any

MAX_DEPTH = 32


def strict_json(content: bytes) -> Any:
    """Returns the value. Raises `ValueError`, which says what is wrong."""
    import orjson  # noqa: PLC0415 (a ledger is read where it is not installed)

    # It refuses what `json` takes: NaN, 1e999, half of a surrogate pair, UTF-16. But it takes a name
    # twice.
    orjson.loads(content)
    try:
        value = _decoder().decode(content.decode())
        if _depth(value) <= MAX_DEPTH:
            return value
    except RecursionError:
        pass
    raise ValueError(f"it is nested too deeply; at most {MAX_DEPTH} levels are read")


def shown(name: str) -> str:
    """Returns a stranger's text for a message: short, and without control characters."""
    return ascii(name[:64])[1:-1]


def _depth(value: Any) -> int:
    """Returns how many objects and lists are within each other."""
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    if {dict, list}.isdisjoint(map(type, inner)):  # as in a long list of token ids
        return 1
    return 1 + max(map(_depth, inner))


@cache
def _decoder() -> json.JSONDecoder:
    """Returns what `json.loads` would make for each value."""
    return json.JSONDecoder(object_pairs_hook=with_unique_names)


def with_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Is an `object_pairs_hook`, which raises `ValueError` for a name that occurs twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} occurs twice")
        fields[name] = value
    return fields
