"""A `multipleOf` that would take long to compile is found by arithmetic."""

import time
from typing import Any

import pytest

from serving.structured.grammar import GrammarError
from serving.structured.multiples import require_cheap_multiples
from tests.serving.structured.schema_cases import closed
from tests.time_limits import slowness

COSTLY: dict[str, dict[str, Any]] = {
    "a prime": {"type": "integer", "multipleOf": 999983},
    "a decimal": {"type": "number", "multipleOf": 0.999983},
    "several at once": {"allOf": [{"multipleOf": number} for number in (97, 89, 83, 79)]},
    "one beside a reference": {"$ref": "#/$defs/n", "multipleOf": 9973},
    "a round one with bounds": {"type": "integer", "multipleOf": 3_000_000, "minimum": 0},
    "bounds elsewhere": {"multipleOf": 3_000_000, "allOf": [{"maximum": 9}]},
    "more than the library holds": {"multipleOf": 10**10},
}
CHEAP = (0, 1, 2.5, 0.01, 7, 1000, 9973, 86_400, 99_991, 604_800, 1_000_000, 6_300_000, True, "x")


@pytest.mark.parametrize("name", COSTLY)
def test_costly_multiples_are_refused_with_their_place(name: str) -> None:
    schema = closed({"x": {"type": "array", "items": COSTLY[name]}})
    with pytest.raises(GrammarError, match="take too long") as caught:
        require_cheap_multiples(schema | {"$defs": {"n": {"multipleOf": 101}}})
    assert caught.value.place == "/properties/x/items"


@pytest.mark.parametrize("number", CHEAP)
def test_others_are_not(number: Any) -> None:
    require_cheap_multiples(closed({"x": {"multipleOf": number}, "y": {"multipleOf": 99_991}}))
    require_cheap_multiples({"multipleOf": number, "$ref": "#/$defs/n", "$defs": {"n": {}}})


def test_conjunctions_that_refer_to_themselves_are_looked_at_once() -> None:
    """It is done where all requests are answered."""
    again = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 300}}, "$ref": "#/$defs/a"}
    began_s = time.thread_time()
    require_cheap_multiples({**again, "multipleOf": 3})
    for no_list in (5, {"a": 1}):
        require_cheap_multiples({"multipleOf": 3, "allOf": no_list})
    assert time.thread_time() - began_s < slowness()
