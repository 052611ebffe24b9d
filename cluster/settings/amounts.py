"""Whole numbers as people write them: `20M` tokens, `64MiB`, `1e6`."""

import re
from decimal import Decimal
from typing import Any, get_args

_AMOUNT = re.compile(
    r"(?P<number>\d+(_\d+)*(\.\d+)?(e\+?\d{1,2})?) ?(?P<unit>[a-z]*)", re.IGNORECASE
)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1}
_BYTES |= {
    f"{prefix}{end}": 1000**power for power, prefix in enumerate("kmgt", 1) for end in ("", "b")
}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def whole_number(text: str, *, is_bytes: bool) -> int | None:
    """Returns the number of things, or of bytes, that the text says; None if it is no whole
    number."""
    match = _AMOUNT.fullmatch(text.strip())
    unit = (_BYTES if is_bytes else _COUNTS).get(match["unit"].lower()) if match else None
    if match is None or unit is None:
        return None
    value = Decimal(match["number"]) * unit
    return int(value) if value == value.to_integral_value() else None


def is_whole_number(annotation: Any) -> bool:
    """Says whether a setting of this type holds a whole number, also beside None or within
    bounds."""
    kinds = get_args(annotation)
    if getattr(annotation, "__metadata__", None) is not None:  # Annotated: the type, and its bounds
        return is_whole_number(kinds[0])
    return annotation is int or any(is_whole_number(kind) for kind in kinds)
