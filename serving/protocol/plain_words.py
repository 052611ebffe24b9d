"""Says in plain sentences what pydantic has found wrong in a request's body, with the field's name
as the client wrote it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from model.files.strict_json import shown
from serving.protocol.errors import ApiError

# pydantic's kinds of errors, by what was expected; the keys in braces are of its contexts
_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of a usual size",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "a text of the form {pattern}",
}
_LENGTHS = {
    "string_too_short": "a length of at least {min_length} characters",
    "string_too_long": "a length of at most {max_length} characters",
    "too_short": "a length of at least {min_length}",
    "too_long": "a length of at most {max_length}",
}
KNOWN = {*_EXPECTED, *_LENGTHS, "missing", "extra_forbidden", "value_error"}
"""The kinds of errors for which there are words."""


def refusal_of(error: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """Describes the first problem of a body: `ApiError` (400)."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = _path(first["loc"], body)
    param = ".".join(shown(str(part)) for part in path)
    if first["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"{param} is not supported; leave it out", param=param, code="unknown_parameter"
        )
    # Of a field that may be of several kinds, each says what it has expected
    kinds = [
        each for each in problems if each["type"] in _EXPECTED and _path(each["loc"], body) == path
    ]
    if first["type"] in _EXPECTED:
        expected = " or ".join(dict.fromkeys(_expected(each) for each in kinds))
        message = f"expected {expected}, got {_value(first['input'])}"
    elif first["type"] in _LENGTHS:
        expected = _LENGTHS[first["type"]].format(**first["ctx"])
        message = f"expected {expected}, got {len(first['input'])}"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        message = f"this value is not allowed: {_value(first['input'])}"
    if not param:  # fields that do not go together
        return ApiError(f"The body: {message}", code="invalid_value")
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")


def _path(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """Returns the steps to a field in the body, without pydantic's names of the kinds that it
    tried there. The last step may be a field that is missing."""
    path: list[str | int] = []
    value = body
    for number, step in enumerate(loc):
        is_there = isinstance(value, Mapping) and step in value
        is_item = isinstance(value, list) and isinstance(step, int) and step < len(value)
        is_last = number == len(loc) - 1
        if is_there or is_item:
            value = value[step]
        elif not (is_last and isinstance(value, Mapping)):
            continue
        path.append(step)
    return path


def _expected(problem: Mapping[str, Any]) -> str:
    bounds = {name: _whole(bound) for name, bound in problem.get("ctx", {}).items()}
    text = _EXPECTED[problem["type"]].format(**bounds)
    if problem["type"] != "literal_error":
        return text
    return text.replace("'", '"').replace("True", "true").replace("False", "false")


def _whole(bound: Any) -> Any:
    """Returns 2 for 2.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _value(value: Any) -> str:
    """Returns a value as JSON where it is short, and otherwise its front or its kind."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = value if len(str(value)) <= 32 else f"{str(value)[:32]}..."
    return (
        json.dumps(text) if isinstance(value, str | bool | int | float | None) else "another kind"
    )
