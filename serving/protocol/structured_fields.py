"""The fields of a request that say what its answer follows: OpenAI's `response_format` and vLLM's
`structured_outputs`."""

import json
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from model.files.strict_json import strict_json
from serving.protocol.errors import ApiError
from serving.protocol.request import Request
from serving.structured.grammar import (
    ANY_JSON_OBJECT,
    MAX_GRAMMAR_BYTES,
    Grammar,
    GrammarKind,
)
from serving.structured.subschemas import without_notes

MAX_CHOICES_OF_TEXT = 256


class JsonSchemaFormat(Request):
    """The schema of an answer. `strict` false, said expressly, ignores keywords that cannot be
    enforced."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    """OpenAI's: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(
                "response_format: json_schema is given with type json_schema, and with no other",
                param="response_format.json_schema",
            )
        return self

    @cached_property
    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            lenient = self.json_schema.strict is False
            return _schema_grammar(self.json_schema.json_schema, lenient=lenient)
        if self.type == "json_object":
            return Grammar(GrammarKind.JSON_SCHEMA, ANY_JSON_OBJECT)
        return None


ChoiceText = Annotated[str, Field(min_length=1, max_length=1024)]


class StructuredOutputs(Request):
    """vLLM's: exactly one of them."""

    FIELD: ClassVar[str] = "structured_outputs"  # of the request
    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: list[ChoiceText] | None = Field(None, min_length=1, max_length=MAX_CHOICES_OF_TEXT)
    grammar: str | None = Field(None, min_length=1)
    json_object: Literal[True] | None = None
    # vLLM's clients write these beside the one that they mean
    disable_any_whitespace: Literal[False] = False
    disable_additional_properties: Literal[False] = False

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        kinds = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object)
        if sum(kind is not None for kind in kinds) != 1:
            raise ApiError(
                "structured_outputs has exactly one of json, regex, choice, grammar and json_object",
                param="structured_outputs",
            )
        return self

    @cached_property
    def parsed(self) -> Grammar:
        """The grammar. Raises `ApiError` (400)."""
        if self.json_schema is not None:
            return _schema_grammar(_as_schema(self.json_schema), lenient=False)
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex)
        if self.choice is not None:
            return Grammar(GrammarKind.CHOICE, json.dumps(self.choice))
        if self.grammar is not None:
            return Grammar(GrammarKind.GRAMMAR, self.grammar)
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_JSON_OBJECT)


class GrammarOfTools(StructuredOutputs):
    """A grammar that was made from a chat's tools, in Lark's notation."""

    FIELD = "tools"

    @cached_property
    def parsed(self) -> Grammar:
        assert self.grammar is not None
        return Grammar(GrammarKind.LARK, self.grammar)


class StructuredFields(Request):
    """Fields of requests that may ask for an answer which follows a grammar."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def grammar_field(self) -> str:
        """The field that has the grammar."""
        structured = self.structured_outputs
        return "response_format" if structured is None else structured.FIELD

    def read_grammar(self) -> Grammar | None:
        """Returns what the answer follows, if anything. Raises `ApiError` (400)."""
        if self.response_format is None and self.structured_outputs is None:
            return None
        formatted = None if self.response_format is None else self.response_format.grammar
        if self.structured_outputs is None:
            grammar = formatted
        elif formatted is None:
            grammar = self.structured_outputs.parsed
        else:
            raise ApiError(
                "response_format and structured_outputs both say what the answer follows; leave one of them out",
                param="structured_outputs",
            )
        if grammar is not None and len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            raise ApiError(
                f"{self.grammar_field} has {len(grammar.text.encode())} bytes, at most {MAX_GRAMMAR_BYTES} are read",
                param=self.grammar_field,
                code="invalid_value",
            )
        return grammar


def _as_schema(schema: dict[str, Any] | str) -> dict[str, Any]:
    """Returns a schema that may be JSON text. Raises `ApiError` (400)."""
    if isinstance(schema, dict):
        return schema
    try:
        parsed, problem = strict_json(schema.encode()), ""
    except ValueError as error:
        parsed, problem = None, f": {error}"
    if not isinstance(parsed, dict):
        raise ApiError(
            f"structured_outputs.json: expected a JSON Schema, as an object or as its JSON text{problem}",
            param="structured_outputs.json",
            code="invalid_value",
        )
    return parsed


def _schema_grammar(schema: dict[str, Any], *, lenient: bool) -> Grammar:
    """Returns the grammar of a schema, whose properties keep their order: answers have it too."""
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(without_notes(schema)), lenient)
