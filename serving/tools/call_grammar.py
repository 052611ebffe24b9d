"""The grammar of calls that must be made, or of calls and of an answer that may be given instead."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.structured.subschemas import moved
from serving.tools.arguments import TaggedArguments, chosen_values, is_text, properties_of
from serving.tools.formats import NO_PARAMETERS, ToolFormat

_WHITESPACE = {
    "whitespace_flexible": False,
    "item_separator": " ?, ?",
    "key_separator": " ?: ?",
}


def grammar_of_calls(
    tool_format: ToolFormat,
    functions: Sequence[Mapping[str, Any]],
    *,
    several: bool,
    special_ids: Mapping[str, int],
    answer: Mapping[str, Any] | None = None,
) -> str:
    """Returns the grammar, in Lark's notation, of one or `several` calls of these functions, or
    else of an `answer`: like a function, it has `parameters`, its schema, which is lenient unless
    it is `strict`."""
    calls, rules = list[str](), list[str]()
    for number, function in enumerate(functions):
        rule = f"arguments_{number}"
        parameters = function.get("parameters") or NO_PARAMETERS
        if answer is not None and not tool_format.opens:
            calls.append(_object_of_call(function, parameters, tool_format))
            continue
        before, after = tool_format.call.split("ARGUMENTS")
        quoted = json.dumps(function["name"]) if '"name"' in before else function["name"]
        begins = _words(before.replace("NAME", quoted), tool_format, special_ids)
        calls.append(f"{begins} {rule} {json.dumps(after) if after else ''}".strip())
        if tool_format.reader is TaggedArguments:
            rules += _tagged(rule, parameters, function)
        else:
            rules.append(f"{rule}: {_json(parameters, function)}")
    made = _calls(tool_format, special_ids, several=several and tool_format.several)
    if answer is not None:
        rules.append(f"answer: {_json(answer['parameters'], answer)}")
    start = "start: calls" if answer is None else "start: calls | answer"
    return "\n".join([start, f"calls: {made}", f"call: {' | '.join(calls)}", *rules, ""])


def _object_of_call(
    function: Mapping[str, Any], parameters: Mapping[str, Any], tool_format: ToolFormat
) -> str:
    """Returns a call that begins as an answer may, with `{`: by a schema, whose parts both share.
    As a text it would have been read too far when it turns out to be the other."""
    written = tool_format.call.replace("NAME", json.dumps(function["name"]))
    parts = json.loads(written.replace("ARGUMENTS", "null"))
    [key] = (key for key, value in parts.items() if value is None)
    properties = {name: {"const": value} for name, value in parts.items()}
    properties[key] = moved(parameters, to=f"/properties/{key}")
    return _json(
        {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        },
        function,
    )


def _calls(tool_format: ToolFormat, special_ids: Mapping[str, int], *, several: bool) -> str:
    opens = _words(tool_format.opens, tool_format, special_ids)
    closes = _words(tool_format.closes, tool_format, special_ids)
    if tool_format.joins:
        more = f"({json.dumps(tool_format.joins)} call)*" if several else ""
        first, last = json.dumps(tool_format.list_opens), json.dumps(tool_format.list_closes)
        return f"{opens} {first} call {more} {last} {closes}"
    one = f"{opens} call {closes}"
    between = '"\\n" ' if tool_format.closes else ""
    return f"{one} ({between}{one})*" if several else one


def _tagged(rule: str, parameters: Mapping[str, Any], function: Mapping[str, Any]) -> Iterator[str]:
    """Yields the rules of arguments between tags, in the order of the schema's properties."""
    required = parameters.get("required") or []
    shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    places = []
    for number, (key, schema) in enumerate(properties_of(parameters).items()):
        if schema is False:
            continue
        place = f"{rule}_{number}"
        places.append(place if key in required else f"{place}?")
        opening = json.dumps(f"{TaggedArguments.OPENS}{key}>\n")
        closing = json.dumps(f"\n{TaggedArguments.CLOSES}\n")
        if not is_text(schema):
            whole = {**shared, **schema} if isinstance(schema, Mapping) else {}
            yield f"{place}: {opening} {_json(whole, function)} {closing}"
        elif values := chosen_values(schema):
            choice = " | ".join(json.dumps(value) for value in values)
            yield f"{place}: {opening} ({choice}) {closing}"
        else:
            yield f"{place}: {opening} {place}_text"
            yield f"{place}_text[suffix={closing}]: {place.upper()}_TEXT"
            yield f"{place.upper()}_TEXT: {_text_pattern(schema)}"
    yield f"{rule}: {' '.join(places)}"


def _text_pattern(schema: Mapping[str, Any]) -> str:
    """Returns the terminal of a text with the bounds and the pattern that its schema has."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    is_bounded = "minLength" in schema or "maxLength" in schema
    terminal = f"/(?s:.{{{least},{most}}})/" if is_bounded else "/(?s:.*)/"
    if pattern := schema.get("pattern"):
        before = "" if pattern.startswith("^") else "(?s:.*)"
        after = "" if pattern.endswith("$") else "(?s:.*)"
        inner = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/")
        terminal += f" & /{before}({inner}){after}/"
    return terminal


def _json(schema: Mapping[str, Any], function: Mapping[str, Any]) -> str:
    """Returns the rule of JSON by a schema, as strict as its function is."""
    options = {**_WHITESPACE, "lenient": not function.get("strict")}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _words(text: str, tool_format: ToolFormat, special_ids: Mapping[str, int]) -> str:
    """Returns a text of a format, in which the name of a special token is that token."""
    marks = [mark for mark in tool_format.marks if mark in special_ids]
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
    return " ".join(
        f"<[{special_ids[part]}]>" if part in marks else json.dumps(part) for part in parts if part
    )
