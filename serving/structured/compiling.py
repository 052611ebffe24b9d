"""Compiles grammars by `llguidance`, within bounds of its own, and says where in a schema it
cannot."""

import json
import re
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import chain, zip_longest
from typing import Any

from serving.structured.compiled_grammar import CompiledGrammar
from serving.structured.exact_numbers import Zone, exact
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.subschemas import escaped, inner_schemas
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


def compiled(grammar: Grammar, vocabulary: Vocabulary) -> CompiledGrammar:
    """Returns a grammar at its start, for copies of which each follows one answer. Raises
    `GrammarError`."""
    grammar, zones = _with_exact_numbers(grammar)
    limits = library().LLParserLimits(**_LIMITS)
    source = _source(grammar)
    matcher = library().LLMatcher(vocabulary.tree, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise _located(grammar, _told(matcher.get_error()))
    return CompiledGrammar(matcher, zones=zones, digits=vocabulary.digits)


def _with_exact_numbers(grammar: Grammar) -> tuple[Grammar, list[Zone]]:
    """Returns a grammar in whose schemas no number is read as another one. Raises
    `GrammarError`."""
    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            schemas = [json.loads(grammar.text)]
            changed, zones = exact(schemas)
            text = json.dumps(changed[0]) if changed != schemas else grammar.text
            return replace(grammar, text=text), zones
        if grammar.kind not in (GrammarKind.LARK, GrammarKind.GRAMMAR):
            return grammar, []
        texts, schemas = _schemas_within(grammar.text)
        changed, zones = exact(schemas)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    written = [f"%json {json.dumps(schema)}" for schema in changed]
    merged = "".join(chain.from_iterable(zip_longest(texts, written, fillvalue="")))
    return replace(grammar, text=merged) if changed != schemas else grammar, zones


def _schemas_within(text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the schemas that a grammar in Lark's notation has, and the texts around them."""
    texts, schemas, start = list[str](), list[dict[str, Any]](), 0
    decoder = json.JSONDecoder()
    for found in re.finditer(r"%json\s+(?={)", text):
        if found.start() < start:
            continue
        try:
            schema, end = decoder.raw_decode(text, found.end())
        except ValueError:  # of which the library says more
            continue
        texts.append(text[start : found.start()])
        schemas.append(schema)
        start = end
    return [*texts, text[start:]], schemas


def _source(grammar: Grammar) -> str:
    """Returns a grammar in `llguidance`'s own notation. Raises `GrammarError`."""
    matcher = library().LLMatcher
    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                overrides = {**_blanks(), "lenient": grammar.lenient}
                source = matcher.grammar_from_json_schema(grammar.text, overrides=overrides)
            case GrammarKind.REGEX:
                source = matcher.grammar_from_regex(grammar.text)
            case GrammarKind.LARK:
                source = matcher.grammar_from_lark(grammar.text)
            case GrammarKind.CHOICE | GrammarKind.GRAMMAR:
                source = library().grammar_from(grammar.kind, grammar.text)
    except ValueError as error:
        raise GrammarError(_told(str(error))) from None
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
    inner = inner_schemas(root)
    while (part := next(inner, None)) is not None and num_left > 0:
        num_left -= 1
        steps, schema = part
        alone = Grammar(grammar.kind, json.dumps({**shared, **schema}), grammar.lenient)
        of_part = _problem(alone)
        is_inner = of_part.startswith(_UNSATISFIABLE) and problem.startswith(_UNSATISFIABLE)
        if of_part == problem or is_inner:
            place = "/".join((place, *map(escaped, steps)))
            inner, problem = inner_schemas(schema), of_part
    return GrammarError(problem, place=_printable(place)[:100])


def _problem(grammar: Grammar) -> str:
    limits = library().LLParserLimits(**_LIMITS)
    return _told(library().LLMatcher.validate_grammar(_source(grammar), None, limits=limits))
