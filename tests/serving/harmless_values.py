"""Values that change nothing, for each field that the endpoint lacks."""

from typing import Any

from serving.protocol import harmless_fields

EXAMPLES: dict[type, list[Any]] = {
    bool: [True, False],
    int: [7],
    str: ["x", ""],
    list: [[], [{"a": "b"}]],
    dict: [{}, {"a": "b"}],
    object: [{"a": "b"}, 7],
}


def values(table: harmless_fields.HarmlessValues, name: str) -> list[Any]:
    known = [EXAMPLES[value] if isinstance(value, type) else [value] for value in table[name]]
    return [None, *(value for some in known for value in some)]
