"""The formats in which open models write calls of tools."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.tools.arguments import ArgumentReader, JsonArguments, TaggedArguments

_JSON_TAIL = r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}\s*'
"""The text that follows the arguments in a JSON object of a call."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call in its text: `opens`, the call and `closes`."""

    name: str
    opens: str  # the text before calls; without one, an answer that begins with `{` may be a call
    closes: str  # and after them
    call: str
    """A call as a model writes it, with `NAME` and `ARGUMENTS` for its own."""
    header: str
    """A pattern of what stands up to the arguments, whose group `name` is the call's name."""
    key: str  # with which a header begins behind its brackets; empty where the name itself does
    tail: str = ""  # a pattern of what stands behind the arguments
    reader: type[ArgumentReader] = JsonArguments
    list_opens: str = ""  # before the first of several
    joins: str = ""  # between two of them; empty where each has its own opening and closing
    list_closes: str = ""
    several: bool = True  # whether its templates write several calls of one answer
    inner_marks: tuple[str, ...] = ()  # in a call
    id_length: int = 0  # of calls, where the template asks for one

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that may be special tokens, and are shown all the same."""
        outer = (self.opens.strip(), self.closes.strip())
        return (*(mark for mark in outer if mark), *self.inner_marks)


def _json_header(arguments: str) -> str:
    """Returns the pattern of a JSON object up to the object under the key `arguments`."""
    name = r'"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")'
    return rf'\s*\[?\s*\{{\s*{name}\s*,\s*"{arguments}"\s*:\s*(?=\{{)'


HERMES = ToolFormat(
    "Hermes",
    opens="<tool_call>\n",
    closes="\n</tool_call>",
    call='{"name": NAME, "arguments": ARGUMENTS}',
    header=_json_header("arguments"),
    key='"name"',
    tail=_JSON_TAIL,
)
"""Also Qwen's, and of many models trained in its way."""

QWEN_CODER = ToolFormat(
    "Qwen3-Coder",
    opens="<tool_call>\n",
    closes="\n</tool_call>",
    call="<function=NAME>\nARGUMENTS</function>",
    header=r"\s*<function=(?P<name>[^>\n]+)>",
    key="<function=",
    reader=TaggedArguments,
)
"""Each argument between tags of its own, and a text without quotes."""

MISTRAL = ToolFormat(
    "Mistral",
    opens="[TOOL_CALLS]",
    closes="",
    call=HERMES.call,
    header=HERMES.header,
    key=HERMES.key,
    tail=_JSON_TAIL,
    list_opens="[",
    joins=", ",
    list_closes="]",
    id_length=9,
)
"""Lists, as its models up to 2024 write them."""

MISTRAL_ARGS = ToolFormat(
    "Mistral with [ARGS]",
    opens="[TOOL_CALLS]",
    closes="",
    call="NAME[ARGS]ARGUMENTS",
    header=r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*(?=\{)",
    key="",
    inner_marks=("[ARGS]", "[CALL_ID]"),
    id_length=9,
)
"""Its models since Mistral Small 3.2."""

LLAMA = ToolFormat(
    "Llama",
    opens="",
    closes="",
    call='{"name": NAME, "parameters": ARGUMENTS}',
    header=_json_header("parameters"),
    key='"name"',
    tail=_JSON_TAIL,
    several=False,
)
"""Llama 3's JSON, of which a semicolon may separate two."""

PYTHON_TAG = "<|python_tag|>"
"""Llama 3 may write it before a call."""

NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
"""The schema of a function that names none."""


def format_of(template: str) -> ToolFormat | None:
    """Returns the format of a chat template, by what the template itself writes; None where it
    takes no tools, or writes calls in a way that is not known here."""
    if not takes_tools(template):
        return None
    if "<tool_call>" in template:
        return QWEN_CODER if "<function=" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if PYTHON_TAG in template or '"parameters"' in template:
        return LLAMA
    return None


def takes_tools(template: str) -> bool:
    return bool(re.search(r"\btools\b", template))
