"""Schemas that cover the keywords of JSON Schema (draft 2020-12) that can be enforced, and those
that cannot."""

from typing import Any

OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with these properties, all of them."""
    return {**OBJECT, "properties": properties, "required": [*properties], **more}


def field(schema: dict[str, Any]) -> dict[str, Any]:
    return closed({"value": schema})


SHORT = {"type": "string", "maxLength": 6}
TREE = {
    "$defs": {"node": closed({"left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})}
}

ENFORCED: dict[str, dict[str, Any]] = {
    "type string": field(SHORT),
    "type integer": field({"type": "integer", "minimum": -99, "maximum": 99}),
    "type number": field({"type": "number", "minimum": -9, "maximum": 9}),
    "type boolean": field({"type": "boolean"}),
    "type null": field({"type": "null"}),
    "type list": field({"type": ["boolean", "null"]}),
    "type array": field({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}),
    "type object": {"type": "object", "maxProperties": 0},
    "root boolean": {"type": "boolean"},
    "root array": {"type": "array", "items": {"type": "null"}, "maxItems": 2},
    "root string": SHORT,
    "root enum": {"enum": [1, "two", None, True, [3], {"four": 4}]},
    "const text": field({"const": 'a "quoted" text'}),
    "const number": field({"const": 1.5}),
    "const object": field({"const": {"a": [1, {"b": None}]}}),
    "enum texts": field({"enum": ["red", "green", "blue"]}),
    "enum beyond ASCII": field({"enum": ["é", "日本", "€5", "🙂"]}),
    "enum of one kind": field({"type": "integer", "enum": [3, 7]}),
    "minimum": field({"type": "integer", "minimum": 17, "maximum": 21}),
    "minimum negative": field({"type": "integer", "minimum": -21, "maximum": -17}),
    "exclusiveMinimum": field({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}),
    "exclusive numbers": field({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "multipleOf": field({"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 50}),
    "minLength": field({"type": "string", "minLength": 2, "maxLength": 5}),
    "maxLength": field({"type": "string", "maxLength": 1}),
    "length beyond ASCII": field({"type": "string", "pattern": "^[é€]{3}$"}),
    "pattern": field({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern alternatives": field({"type": "string", "pattern": "^(ab|cd)+$", "maxLength": 6}),
    "format date": field({"type": "string", "format": "date"}),
    "format time": field({"type": "string", "format": "time"}),
    "format date-time": field({"type": "string", "format": "date-time"}),
    "format uuid": field({"type": "string", "format": "uuid"}),
    "format ipv4": field({"type": "string", "format": "ipv4"}),
    "format ipv6": field({"type": "string", "format": "ipv6"}),
    "format email": field({"type": "string", "format": "email"}),
    "format duration": field({"type": "string", "format": "duration"}),
    "required": {**OBJECT, "properties": {"a": SHORT, "b": SHORT}, "required": ["b"]},
    "optional": {**OBJECT, "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
    "additionalProperties": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "minProperties": {
        "type": "object",
        "additionalProperties": {"type": "null"},
        "minProperties": 1,
        "maxProperties": 1,
    },
    "nested": closed({"a": closed({"b": closed({"c": {"enum": [1, 2]}})})}),
    "items": field({"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 4}),
    "items objects": field(
        {"type": "array", "items": closed({"n": {"type": "boolean"}}), "maxItems": 2}
    ),
    "minItems": field({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 3}),
    "prefixItems": field(
        {"type": "array", "prefixItems": [{"const": 1}, SHORT], "items": False, "minItems": 2}
    ),
    "prefixItems and items": field(
        {
            "type": "array",
            "prefixItems": [{"const": "first"}],
            "items": {"type": "boolean"},
            "minItems": 2,
            "maxItems": 3,
        }
    ),
    "anyOf": field({"anyOf": [{"type": "boolean"}, SHORT]}),
    "anyOf objects": {"anyOf": [closed({"a": {"const": 1}}), closed({"b": {"const": 2}})]},
    "oneOf that exclude each other": {
        "oneOf": [closed({"kind": {"const": "a"}}), closed({"kind": {"const": "b"}})]
    },
    "oneOf of kinds": field({"oneOf": [{"type": "boolean"}, {"type": "null"}]}),
    "allOf": field({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}),
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "maxProperties": 2,
    },
    "$ref": {**field({"$ref": "#/$defs/color"}), "$defs": {"color": {"enum": ["red", "blue"]}}},
    "$ref to definitions": {
        **field({"$ref": "#/definitions/x"}),
        "definitions": {"x": {"type": "boolean"}},
    },
    "$ref recursive": {**TREE, "$ref": "#/$defs/node"},
    "$ref with siblings": {
        **field({"$ref": "#/$defs/n", "maximum": 3}),
        "$defs": {"n": {"type": "integer", "minimum": 1}},
    },
    "title and description": {**field({"type": "null"}), "title": "T", "description": "D"},
    "default and examples": field({"type": "boolean", "default": True, "examples": [False]}),
    "$schema and $id": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/s",
        **field({"type": "null"}),
    },
    "names to escape": closed({'a "b"': {"type": "null"}, "c/d~é": {"type": "boolean"}}),
    "the order of properties": closed({"z": {"type": "null"}, "a": {"type": "null"}}),
    "a function's parameters": closed(
        {
            "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {
                "type": "array",
                "items": {"type": "integer", "minimum": 1, "maximum": 7},
                "maxItems": 3,
            },
        }
    ),
}

REFUSED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "contains": {"type": "null"}, "minContains": 2},
    "not": {"not": {"type": "null"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "oneOf that overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "a reference elsewhere": {"$ref": "https://example.com/schema.json"},
    "a reference to nothing": {"$ref": "#/$defs/missing"},
    "an unknown format": {"type": "string", "format": "colour"},
    "an unknown type": {"type": "text"},
    "look-around": {"type": "string", "pattern": "^(?=a)b"},
    "bounds that contradict each other": {"type": "integer", "minimum": 4, "maximum": 3},
}
