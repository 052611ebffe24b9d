"""Fields of OpenAI's and vLLM's interfaces that this endpoint lacks, each with the values that
change nothing.

The rule: what would change the answer is refused, everything else is accepted.
"""

import json
from collections.abc import Mapping
from typing import Any

from model.tables import read_table

HarmlessValues = Mapping[str, tuple[Any, ...]]
"""The harmless values of each field, besides null. A type stands for all of its values."""


KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "any whole number",
    str: "any text",
    list: "any list",
    dict: "any object",
    object: "any value",
}
"""Signs for all values of a kind, with their words."""


def _table(name: str) -> HarmlessValues:
    kinds = {kind.__name__: kind for kind in KINDS}
    entries = read_table(__file__, "harmless_fields")[name]
    return {
        field: (kinds[entry["any"]],) if "any" in entry else tuple(entry["values"])
        for entry in entries
        for field in entry["names"]
    }


FIELDS, MESSAGE_FIELDS = _table("request"), _table("message")
RESPONSE_FIELDS, ITEM_FIELDS = _table("response"), _table("item")


def is_harmless(name: str, value: Any, table: HarmlessValues) -> bool:
    if value is None:
        return name in table
    return any(
        isinstance(value, known)
        if isinstance(known, type)
        else type(value) is type(known) and value == known
        for known in table.get(name, ())
    )


def advice(name: str, table: HarmlessValues) -> str:
    """Tells a client what to do about a field whose value is not harmless."""
    values = [
        KINDS[known] if isinstance(known, type) else json.dumps(known) for known in table[name]
    ]
    return f"leave it out{', or give ' if values else ''}{' or '.join(values)}"
