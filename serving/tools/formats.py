"""The formats in which open models write calls of tools, and the grammar of a call that must be
made."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WHITESPACE = {
    "whitespace_flexible": False,
    "item_separator": " ?, ?",
    "key_separator": " ?: ?",
}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolFormat:
    """What stands around a call `{"name": …, ARGUMENTS: {…}}` in a model's text."""

    name: str
    arguments: str  # the key of a call's arguments
    opens: str  # the text before calls; without one, an answer that begins with `{` may be a call
    closes: str  # and after them
    list_opens: str = ""  # before the first of several
    joins: str = ""  # between two of them; empty where each has its own opening and closing
    list_closes: str = ""
    several: bool = True
    id_length: int = 0  # of calls, where the template asks for one

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that may be special tokens, and are shown all the same."""
        return tuple(mark for mark in (self.opens.strip(), self.closes.strip()) if mark)


HERMES = ToolFormat("Hermes", "arguments", "<tool_call>\n", "\n</tool_call>")
"""Also Qwen's, and of many models trained in its way."""

MISTRAL = ToolFormat(
    "Mistral",
    "arguments",
    "[TOOL_CALLS]",
    "",
    list_opens="[",
    joins=", ",
    list_closes="]",
    id_length=9,
)
LLAMA = ToolFormat("Llama", "parameters", "", "", several=False)
"""Llama 3's JSON."""

PYTHON_TAG = "<|python_tag|>"
"""Llama 3 may write it before a call."""


def format_of(template: str) -> ToolFormat | None:
    """Returns the format of a chat template, by what the template itself writes; None where it
    takes no tools, or writes calls in a way that is not known here."""
    if not re.search(r"\btools\b", template) or "[ARGS]" in template:
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if PYTHON_TAG in template or '"parameters"' in template:
        return LLAMA
    return None


def takes_tools(template: str) -> bool:
    return bool(re.search(r"\btools\b", template))


def grammar_of_calls(
    tool_format: ToolFormat,
    functions: Sequence[Mapping[str, Any]],
    *,
    several: bool,
    special_ids: Mapping[str, int],
) -> str:
    """Returns the grammar, in Lark's notation, of one or `several` calls of these functions. The
    schema of a function is lenient unless it is strict."""
    calls, rules = [], []
    for number, function in enumerate(functions):
        begins = f'{{"name": {json.dumps(function["name"])}, "{tool_format.arguments}": '
        calls.append(f'{json.dumps(begins)} arguments_{number} "}}"')
        options = {**_WHITESPACE, "lenient": not function.get("strict")}
        parameters = {**(function.get("parameters") or NO_PARAMETERS), "x-guidance": options}
        rules.append(f"arguments_{number}: %json {json.dumps(parameters)}")
    opens = _mark(tool_format.opens, special_ids)
    closes = _mark(tool_format.closes, special_ids)
    several = several and tool_format.several
    if tool_format.joins:
        more = f"({json.dumps(tool_format.joins)} call)*" if several else ""
        inner = f"{json.dumps(tool_format.list_opens)} call {more} {json.dumps(tool_format.list_closes)}"
        start = f"start: {opens} {inner} {closes}"
    else:
        one = f"{opens} call {closes}"
        start = f'start: {one} ("\\n" {one})*' if several else f"start: {one}"
    return "\n".join([start, f"call: {' | '.join(calls)}", *rules, ""])


def _mark(text: str, special_ids: Mapping[str, int]) -> str:
    """Returns a text of a format, in which the name of a special token is that token."""
    mark = text.strip()
    if mark not in special_ids:
        return json.dumps(text) if text else ""
    before, after = text.split(mark)
    parts = [json.dumps(before) if before else "", f"<[{special_ids[mark]}]>"]
    return " ".join([*parts, json.dumps(after) if after else ""])
