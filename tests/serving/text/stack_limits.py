"""A chain of references, checked and compiled as an engine does, whatever the limit of this
process's stack is."""

import asyncio
import json
import sys
from pathlib import Path

from serving.structured.grammar import Grammar, GrammarKind
from serving.structured.grammar_cache import GrammarCache
from serving.structured.vocabulary import vocabulary_of
from serving.text.grammar_check import GrammarCheck

LENGTH = 1000  # which no thread of 2 MiB compiles, as it has where the limit is unlimited


def chain(length: int) -> Grammar:
    """Lists within lists, by as many references."""
    lists: dict[str, object] = {
        f"n{i}": {"type": "array", "items": {"$ref": f"#/$defs/n{i + 1}"}} for i in range(length)
    }
    schema = {"$defs": {**lists, f"n{length}": {"type": "null"}}, "$ref": "#/$defs/n0"}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


async def check(checkpoint: Path, grammar: Grammar) -> None:
    grammars = GrammarCheck(checkpoint)
    await grammars.require(grammar)
    grammars.close()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asyncio.run(check(folder, chain(LENGTH)))
    GrammarCache(lambda: vocabulary_of(folder)).get(chain(LENGTH)).result()
