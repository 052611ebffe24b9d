"""Has whole numbers beyond 2^53 in answers as their schema writes them, although `llguidance` reads
each number as a double, which not all of them are.

Such a constant is compiled as the range of whole numbers between the doubles around it, and
`NumberMask` leaves of that range only the constant.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.structured.grammar import GrammarError
from serving.structured.subschemas import FOR_PEOPLE, Schema, escaped, inner_schemas, put

LARGEST = 1 << 53  # up to which doubles hold every whole number
NUM_SHARED = 12  # first digits that all numbers near a constant have in common, at least
_LARGEST_INT = (1 << 63) - 1
_LARGEST_DOUBLE = (1 << 63) - 1024  # below 2^63
_LEAST = ("minimum", "exclusiveMinimum")
_MOST = ("maximum", "exclusiveMaximum")
# Where they need not be a double's neighbor, which `llguidance` takes for an excluded one's
_INWARD = {"exclusiveMinimum": -LARGEST, "exclusiveMaximum": LARGEST}


@dataclass(frozen=True)
class Zone:
    """The whole numbers from `low` to `high`, all as long and without their sign, of which an
    answer may have only the `allowed` ones. It has numbers outside too that begin alike."""

    low: int
    high: int
    allowed: frozenset[int]


class _Range(NamedTuple):
    """The whole numbers from `low` to `high` of one sign, at one place of a schema."""

    low: int
    high: int
    is_negative: bool
    place: str


_Constants = dict[_Range, set[int]]  # without their sign


def exact(schemas: Sequence[Schema]) -> tuple[list[Schema], list[Zone]]:
    """Returns the schemas of one answer so that `llguidance` reads no number in them as another one,
    and the zones of their constants. Raises `GrammarError` for a number that cannot be held."""
    changed, zones = list[Schema](), set[Zone]()
    written = sorted({*_numbers([*schemas])})
    beside: dict[str, list[int]] = {}  # by their first digits
    for number in written:
        beside.setdefault(_beginning(number), []).append(number)
    for schema in schemas:
        found: _Constants = {}
        changed.append(_changed(schema, "", found))
        for at, constants in found.items():
            # Once is enough, as all zones are asked together
            others = beside.pop(_beginning(at.low), [])
            outside = (one for one in others if not at.low <= one <= at.high)
            zones.add(Zone(at.low, at.high, frozenset({*constants, *outside})))
    if zones:
        _require_apart(zones, written)
    return changed, sorted(zones, key=lambda zone: zone.low)


def _beginning(number: int) -> str:
    return f"{number}"[:NUM_SHARED]


def _changed(schema: Schema, place: str, found: _Constants) -> Schema:
    """Returns a schema without constants that no double holds, which it adds."""
    changed = {**schema, **_bounds(schema, place)}
    for word, values in (("const", [schema.get("const")]), ("enum", schema.get("enum"))):
        if isinstance(values, list) and any(map(_is_lost, values)):
            at = f"{place}/{word}"
            options = [
                _constant(value, at if _is_number(value) else f"{at}/{number}", found)
                for number, value in enumerate(values)
            ]
            _add_doubles(values, at, found)
            del changed[word]
            changed["allOf"] = [*changed.get("allOf", ()), {"anyOf": options}]
    looked_into = {*_LEAST, *_MOST, *FOR_PEOPLE, "const", "enum", "allOf"}
    for steps, inner in inner_schemas(schema):
        looked_into.add(steps[0])
        new = _changed(inner, "/".join((place, *map(escaped, steps))), found)
        put(changed, steps, new, instead_of=schema)
    for word, value in schema.items():
        if word not in looked_into and not word.startswith("x-") and _is_lost(value):
            problem = f"a whole number beyond 2^53 in {word} is not read exactly"
            raise GrammarError(problem, place=f"{place}/{escaped(word)}")
    return changed


def _bounds(schema: Schema, place: str) -> dict[str, int]:
    """Returns the bounds to have instead of those beyond 64 bits, which narrow them to what is
    held. Raises `GrammarError` for one that is no double, or excludes one without a neighbor."""
    instead = {}
    for word in (*_LEAST, *_MOST):
        bound = schema.get(word)
        if not isinstance(bound, int) or abs(bound) < LARGEST or bound == _INWARD.get(word):
            continue
        if word in _LEAST and bound < -_LARGEST_DOUBLE:
            instead[word] = -_LARGEST_DOUBLE
        elif word in _MOST and bound >= _LARGEST_INT:
            instead[word] = _LARGEST_INT
        elif word in _INWARD or not _is_double(bound):
            problem = (
                f"{word} is {bound}, which is not read exactly: expected at most 2^53, {LARGEST}"
            )
            raise GrammarError(problem, place=f"{place}/{word}")
    return instead


def _constant(value: Any, place: str, found: _Constants) -> Schema:
    """Returns the schema of a constant; numbers of an enum have one place. Raises `GrammarError` for
    a number that cannot be held."""
    if not _is_lost(value):
        return {"const": value}
    if isinstance(value, dict):
        inner = {
            name: _constant(one, f"{place}/{escaped(name)}", found) for name, one in value.items()
        }
        closed = {"type": "object", "required": [*inner], "additionalProperties": False}
        return {**closed, "properties": inner}
    if isinstance(value, list):
        items = [_constant(one, f"{place}/{number}", found) for number, one in enumerate(value)]
        length = {"minItems": len(items), "maxItems": len(items)}
        # The words of all drafts before 2020-12, which are read in any
        return {"type": "array", "items": items, "additionalItems": False, **length}
    low, high = _doubles_around(min(abs(value), 1 << 64))
    if high > _LARGEST_DOUBLE or str(low)[:NUM_SHARED] != str(high)[:NUM_SHARED]:
        raise GrammarError(
            f"{str(value)[:40]} is not written exactly: have it as a text", place=place
        )
    found.setdefault(_Range(low, high, value < 0, place), set()).add(abs(value))
    least, most = (low, high) if value > 0 else (-high, -low)
    return {"type": "integer", "minimum": least, "maximum": most}


def _add_doubles(values: Sequence[Any], place: str, found: _Constants) -> None:
    """Allows an enum's numbers that doubles hold where a range around one of its others ends."""
    for value in values:
        if not _is_number(value) or _is_lost(value):
            continue
        for at, constants in found.items():
            is_end = abs(value) in (at.low, at.high)
            if is_end and (at.place, at.is_negative) == (place, value < 0):
                constants.add(abs(value))


def _doubles_around(number: int) -> tuple[int, int]:
    nearest = float(number)
    other = math.nextafter(nearest, math.inf if nearest < number else -math.inf)
    low, high = sorted((int(nearest), int(other)))
    return low, high


def _require_apart(zones: Iterable[Zone], written: Sequence[int]) -> None:
    """Raises `GrammarError` where another place of the schema has a number near a constant: what
    is allowed there would be here too."""
    for zone in zones:
        within = written[bisect_left(written, zone.low) : bisect_right(written, zone.high)]
        near = [one for one in within if one not in zone.allowed]
        if near:
            own = (one for one in zone.allowed if zone.low <= one <= zone.high)
            raise GrammarError(
                f"{min(own)} and {min(near)} are beyond 2^53, and too near to each other for two places: "
                "have them in one enum, or as texts"
            )


def _numbers(value: Any) -> Iterator[int]:
    """Yields the whole numbers beyond 2^53 anywhere in a value, and those in its texts, without
    their signs."""
    if isinstance(value, str):
        words = "".join(c if c in "0123456789" else " " for c in value).split()
        yield from (int(word) for word in words if NUM_SHARED < len(word) < 40)
    elif _is_number(value) and abs(value) >= LARGEST:
        yield abs(value)
    elif isinstance(value, dict | list):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _numbers(one)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_double(number: int) -> bool:
    try:
        return float(number) == number
    except OverflowError:
        return False


def _is_lost(value: Any) -> bool:
    """Tells whether a constant has a whole number that would be written as another one. What has
    64 bits is written whole, and else the digits that tell a double from its neighbors."""
    if isinstance(value, dict):
        return any(map(_is_lost, value.values()))
    if isinstance(value, list):
        return any(map(_is_lost, value))
    if not _is_number(value) or abs(value) < LARGEST:
        return False
    if value == _LARGEST_INT or (_is_double(value) and abs(value) < _LARGEST_INT):
        return False
    if not _is_double(value):
        return True
    digits = repr(float(abs(value))).partition("e")[0].replace(".", "")
    return digits.rstrip("0") != str(abs(value)).rstrip("0")
