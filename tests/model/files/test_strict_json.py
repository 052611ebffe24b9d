"""JSON that two readers could understand differently is refused, wherever in a text it stands."""

import json

import pytest

from model.files.strict_json import MAX_DEPTH, strict_json


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, {"b": "é"}]}, [], "text", 3, None])
def test_what_is_right_is_read_as_json_reads_it(value: object) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 1}', "the key a occurs twice"),
        ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "the key b occurs twice"),
        ('{"a": 1, "\\u0061": 2}', "the key a occurs twice"),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"the key \x1b[31m occurs twice"),
        ('{"a": NaN}', "expected a JSON value"),
        ('{"a": Infinity}', "expected a JSON value"),
        ('{"a": 1e999}', "number is infinity"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply; at most 32 levels"),
        ("[" * 1000 + "]" * 1000, "nested too deeply; at most 32 levels"),
        ("[" * 100_000 + "]" * 100_000, "depth limit exceeded"),
        ("", "empty document"),
    ],
)
def test_what_readers_take_differently_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        strict_json(text.encode())
    assert problem in str(refused.value)
