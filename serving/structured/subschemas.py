"""Where schemas stand in a JSON Schema, and schemas rewritten place by place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
FOR_PEOPLE = ("$comment", "default", "description", "examples", "title")

Schema = dict[str, Any]


def inner_schemas(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Schema]]:
    """Yields the schemas that stand directly in a schema, each with its place there: a keyword, and
    perhaps a name or a number."""
    for keyword in _ONE:
        if isinstance(schema.get(keyword), dict):
            yield (keyword,), schema[keyword]
    for keyword in (*_LISTS, *_OBJECTS):
        several = schema.get(keyword)
        if isinstance(several, list):
            places = ((str(number), one) for number, one in enumerate(several))
        elif isinstance(several, dict):
            places = ((name, one) for name, one in several.items())
        else:
            continue
        yield from (((keyword, step), one) for step, one in places if isinstance(one, dict))


def escaped(step: str) -> str:
    """Returns a step to a place as JSON pointers have it (RFC 6901)."""
    return step.replace("~", "~0").replace("/", "~1")


def without_notes(schema: Mapping[str, Any]) -> Schema:
    """Returns a schema without what it says to people, which no answer depends on."""
    return _rewritten(
        schema, lambda one: {word: one[word] for word in one if word not in FOR_PEOPLE}
    )


def moved(schema: Mapping[str, Any], *, to: str) -> Schema:
    """Returns a schema that is to stand at `to`, a JSON pointer, in another one: what it refers to
    in itself is there too."""

    def change(one: Mapping[str, Any]) -> Schema:
        match one.get("$ref"):
            case str(target) if target == "#" or target.startswith("#/"):
                return {**one, "$ref": f"#{to}{target[1:]}"}
        return {**one}

    return _rewritten(schema, change)


def _rewritten(schema: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Schema]) -> Schema:
    """Returns a schema in which each schema, and itself, was changed."""
    changed = change(schema)
    for steps, inner in inner_schemas(changed):
        put(changed, steps, _rewritten(inner, change), instead_of=schema)
    return changed


def put(
    changed: Schema, steps: Sequence[str], inner: Schema, *, instead_of: Mapping[str, Any]
) -> None:
    """Puts a schema at a place of `inner_schemas`. What is changed stands instead of another
    schema, which stays as it is."""
    keyword, *others = steps
    if not others:
        changed[keyword] = inner
        return
    [step] = others
    if changed[keyword] is instead_of.get(keyword):
        changed[keyword] = copy(changed[keyword])
    several = changed[keyword]
    several[int(step) if isinstance(several, list) else step] = inner
