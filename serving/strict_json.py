"""JSON as strictly as strangers' bodies need it: one object, UTF-8, no key twice, only finite numbers, not too deep."""

import json
import math
import re
from typing import Any, NoReturn

from serving.errors import invalid_request

MAX_DEPTH = 32
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # UTF-8 has none


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Raises `ApiError` (400). Text that cannot be encoded (half of a surrogate pair) is refused too."""
    try:
        fields = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1]
        raise invalid_request(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid_request("The body must be a JSON object", code="invalid_json")
    _require_shallow(fields)
    if _ESCAPED_SURROGATE.search(body) is None:
        return fields
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid_request(
                f"{shown(name)} contains half of a surrogate pair, which is no character", param=shown(name)
            ) from None
    return fields


def shown(name: str) -> str:
    """A client's own text in a message: short, and without control characters."""
    return ascii(name[:64])[1:-1]


def _require_shallow(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise invalid_request(
                f"The body is not valid JSON: it is nested too deeply; at most {MAX_DEPTH} levels are read",
                code="invalid_json",
            )
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} occurs twice")
        fields[name] = value
    return fields


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite_float(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal[:32]} is too large a number")
    return value
