"""Compiles grammars by `llguidance`, within bounds of its own, and says where in a schema it
cannot."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.vocabulary import Vocabulary, library

# What a grammar may take: 2 kB for each state, 14,000 units of fuel in a millisecond
_LIMITS = {
    "max_grammar_size": 200_000,
    "max_lexer_states": 20_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 5_000,
    "verbose_errors": False,
}
_BLANKS = r"(\n {0,32}| )"
"""Between the parts of JSON: a blank, or a line's end and an indentation. Without a bound some models
would write blanks for ever."""

_UNSATISFIABLE = "Unsatisfiable schema"  # which the outer schema says otherwise than the inner
_MAX_PLACES = 500  # of a schema that are looked at to find the one which is wrong
_SUBSCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def compiled(grammar: Grammar, vocabulary: Vocabulary) -> Any:
    """Returns the `LLMatcher` of a grammar at its start, for copies of which each follows one
    answer. Raises `GrammarError`."""
    limits = library().LLParserLimits(**_LIMITS)
    source = _source(grammar)
    matcher = library().LLMatcher(vocabulary.tree, source, log_level=0, limits=limits)
    if not matcher.is_error():
        return matcher
    raise _located(grammar, _told(matcher.get_error()))


def _source(grammar: Grammar) -> str:
    """Returns a grammar in `llguidance`'s own notation. Raises `GrammarError`."""
    matcher = library().LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            overrides = {**_blanks(), "lenient": grammar.lenient}
            source = matcher.grammar_from_json_schema(grammar.text, overrides=overrides)
        case GrammarKind.REGEX:
            source = matcher.grammar_from_regex(grammar.text)
        case GrammarKind.LARK:
            source = matcher.grammar_from_lark(grammar.text)
        case GrammarKind.CHOICE | GrammarKind.GRAMMAR:
            try:
                source = library().grammar_from(grammar.kind, grammar.text)
            except ValueError as error:
                raise GrammarError(str(error)) from None
    return str(source)


@cache
def _blanks() -> dict[str, Any]:
    """Returns where JSON may have blanks. Releases before 1.9, one of which vLLM 0.32 requires,
    repeat a pattern without bound: they get blanks at commas and colons, and none at brackets."""
    major, minor, *_ = version("llguidance").split(".")
    if (int(major), int(minor)) >= (1, 9):
        return {"whitespace_pattern": _BLANKS}
    return {
        "whitespace_flexible": False,
        "item_separator": f"{_BLANKS}?,{_BLANKS}?",
        "key_separator": f"{_BLANKS}?:{_BLANKS}?",
    }


def _told(error: str) -> str:
    """Returns an error of the library on one line, in which a client's text may be."""
    return _printable(" ".join(error.split()))[:250]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _located(grammar: Grammar, problem: str) -> GrammarError:
    """Returns the error with the innermost part of a schema that has the problem by itself."""
    if grammar.kind is not GrammarKind.JSON_SCHEMA:
        return GrammarError(problem)
    root = json.loads(grammar.text)
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    place, num_left = "", _MAX_PLACES
    inner = _parts(root)
    while (part := next(inner, None)) is not None and num_left > 0:
        num_left -= 1
        step, schema = part
        alone = Grammar(grammar.kind, json.dumps({**shared, **schema}), grammar.lenient)
        of_part = _problem(alone)
        is_inner = of_part.startswith(_UNSATISFIABLE) and problem.startswith(_UNSATISFIABLE)
        if of_part == problem or is_inner:
            place, inner, problem = f"{place}/{step}", _parts(schema), of_part
    return GrammarError(problem, place=_printable(place)[:100])


def _problem(grammar: Grammar) -> str:
    limits = library().LLParserLimits(**_LIMITS)
    return _told(library().LLMatcher.validate_grammar(_source(grammar), None, limits=limits))


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the schemas that stand directly in a schema, by their place in it."""
    for name in _SUBSCHEMAS:
        if isinstance(schema.get(name), dict):
            yield name, schema[name]
    for name in (*_LISTS, *_OBJECTS):
        several = schema.get(name)
        if isinstance(several, list):
            places = ((f"{name}/{number}", one) for number, one in enumerate(several))
        elif isinstance(several, dict):
            places = ((f"{name}/{_escaped(key)}", one) for key, one in several.items())
        else:
            continue
        yield from ((place, one) for place, one in places if isinstance(one, dict))


def _escaped(key: str) -> str:
    """Returns a key as JSON pointers have it (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")
