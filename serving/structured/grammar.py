"""The grammar of an answer, as a client gave it: a JSON Schema, a regular expression, a choice
of texts or a context-free grammar."""

from dataclasses import dataclass, field
from enum import StrEnum

MAX_GRAMMAR_BYTES = 128 << 10  # OpenAI reads schemas of 120,000 characters
STACK_BYTES = 64 << 20
"""Of an engine's thread that compiles, since `llguidance` recurses by reference. Where a grammar is
tried before, it has half of it."""


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json"  # the text is a JSON Schema
    REGEX = "regex"  # a regular expression, of the whole answer
    CHOICE = "choice"  # a JSON list of texts, of which the answer is one
    GRAMMAR = "grammar"  # a grammar in Lark's or GBNF's notation
    LARK = "lark"  # one that was made here, in Lark's notation


@dataclass(frozen=True)
class Grammar:
    """A grammar that may not have been read yet."""

    kind: GrammarKind
    text: str
    lenient: bool = False  # keywords of a schema that cannot be enforced are ignored
    # That it took when it was compiled before; 0 if that is not known
    num_bytes: int = field(default=0, compare=False)


class GrammarError(Exception):
    """A grammar that no answer can be made to follow. `place` is where, in a schema, as a JSON
    pointer."""

    def __init__(self, message: str, *, place: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place


ANY_JSON_OBJECT = '{"type":"object"}'
"""The schema of every JSON object."""
