"""Grammars are compiled in a bounded process first, and what it says is kept."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.text.grammar_check import GrammarBounds, GrammarCheck, GrammarsBusyError
from tests.serving.structured.schema_cases import closed

GOOD = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(closed({"a": {"type": "null"}})))
BAD = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(closed({"a": {"not": {}}})))


def exploding(depth: int) -> Grammar:
    """Objects of which each has the next one three times, beside a conjunction with it."""
    definitions: dict[str, object] = {f"n{depth}": {"type": "object"}}
    for number in range(depth):
        inner = {"$ref": f"#/$defs/n{number + 1}"}
        definitions[f"n{number}"] = {"properties": {"a": inner, "b": inner}, "allOf": [inner]}
    schema = {"$defs": definitions, "$ref": "#/$defs/n0"}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def test_grammars_are_judged_and_the_verdicts_kept(checkpoint: Path) -> None:
    async def check() -> None:
        grammars = GrammarCheck(checkpoint)
        for _ in range(2):
            await grammars.require(GOOD)
            with pytest.raises(GrammarError, match="not") as caught:
                await grammars.require(BAD)
            assert caught.value.place == "/properties/a"
        grammars.close()
        await grammars.require(GOOD)  # known without the process
        with pytest.raises(GrammarError, match="not served any more"):
            await grammars.require(Grammar(GrammarKind.REGEX, "a"))

    asyncio.run(check())


def test_a_schema_made_to_explode_ends_in_its_bound_and_the_next_is_read(checkpoint: Path) -> None:
    bounds = GrammarBounds(grammar_cpu_s=0.2)

    async def check() -> None:
        grammars = GrammarCheck(checkpoint, bounds)
        for grammar in (exploding(20), exploding(20), GOOD):
            began_s = time.process_time()
            if grammar is GOOD:
                await grammars.require(grammar)
            else:
                with pytest.raises(GrammarError, match=r"more than 0.2 s of processor time"):
                    await grammars.require(grammar)
            assert time.process_time() - began_s < 0.2  # this process has not compiled it
        grammars.close()

    asyncio.run(check())


def test_grammars_that_wait_are_bounded(checkpoint: Path) -> None:
    async def check() -> None:
        grammars = GrammarCheck(checkpoint, GrammarBounds(max_waiting=2))
        several = [grammars.require(Grammar(GrammarKind.REGEX, f"a{n}")) for n in range(5)]
        results = await asyncio.gather(*several, return_exceptions=True)
        assert [type(result) for result in results].count(GrammarsBusyError) == 3
        grammars.close()

    asyncio.run(check())
