"""Reads the arguments of a call, in the way that a format writes them, as JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

_PYTHON_VALUES = {"True": "true", "False": "false", "None": "null"}
"""Which a template writes where it prints a value of Python."""


class ArgumentReader(Protocol):
    """The arguments of one call."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        """`parameters` is the JSON Schema of the function's parameters."""

    def read(self, text: str) -> tuple[str, str, bool]:
        """Returns the JSON that the text adds, the rest of it that cannot be read yet, and whether
        the arguments have ended. The joined JSON is the same however the text is cut."""


class JsonArguments(ArgumentReader):
    """A JSON object, as it stands."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False

    def read(self, text: str) -> tuple[str, str, bool]:
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped = character == "\\"
                self._in_text = character != '"'
            elif character == '"':
                self._in_text = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    return text[: place + 1], text[place + 1 :], True
        return text, "", False


class TaggedArguments(ArgumentReader):
    """`<parameter=KEY>`, the value and `</parameter>` for each argument, and then `</function>`.

    A text stands there without quotes: what a value means is in the schema of its parameter.
    """

    OPENS, CLOSES, ENDS = "<parameter=", "</parameter>", "</function>"
    _KEY = re.compile(rf"{OPENS}([^>\n]*)>\n?")

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._schemas = properties_of(parameters)
        self._num_read = 0
        self._in_value, self._is_text = False, False

    def read(self, text: str) -> tuple[str, str, bool]:
        found = ""
        while True:
            before = text
            if not self._in_value:
                text = text.lstrip()
                if text.startswith(self.ENDS):
                    return found + ("}" if self._num_read else "{}"), text[len(self.ENDS) :], True
                added, text = self._key(text)
            elif self._is_text:
                added, text = self._text(text)
            else:
                added, text = self._value(text)
            found += added
            if text == before:
                return found, text, False

    def _key(self, text: str) -> tuple[str, str]:
        opening = self._KEY.match(text)
        if opening is None:
            return "", text if self._may_open(text) else _from_tag(text)
        if opening.end() == len(text):  # a line's end may follow
            return "", text
        key = opening[1]
        self._is_text = is_text(self._schemas.get(key))
        self._in_value, self._num_read = True, self._num_read + 1
        begins = "{" if self._num_read == 1 else ", "
        return f"{begins}{_quoted(key)}: " + '"' * self._is_text, text[opening.end() :]

    def _may_open(self, text: str) -> bool:
        """Whether a tag's name or its end has not arrived yet."""
        is_cut = text.startswith(self.OPENS) and "\n" not in text
        return is_cut or self.OPENS.startswith(text) or self.ENDS.startswith(text)

    def _text(self, text: str) -> tuple[str, str]:
        """Takes a text up to its closing tag, before which a line ends."""
        end = text.find(self.CLOSES)
        if end >= 0:
            self._in_value = False
            return f'{_escaped(text[:end].removesuffix(chr(10)))}"', text[end + len(self.CLOSES) :]
        held = max(length_of_start(text, mark) for mark in (self.CLOSES, f"\n{self.CLOSES}"))
        return _escaped(text[: len(text) - held]), text[len(text) - held :]

    def _value(self, text: str) -> tuple[str, str]:
        """Takes a value once it is whole: as JSON or, where it is none, as a text."""
        end = text.find(self.CLOSES)
        if end < 0:
            return "", text
        self._in_value = False
        return _as_json(text[:end].strip()), text[end + len(self.CLOSES) :]


def properties_of(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the schemas of a function's parameters by name."""
    properties = parameters.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def is_text(schema: Any) -> bool:
    """Whether each value of a JSON Schema is a string."""
    if not isinstance(schema, Mapping):
        return False
    values = chosen_values(schema)
    if values:
        return all(isinstance(value, str) for value in values)
    return bool(schema.get("type") == "string")


def chosen_values(schema: Mapping[str, Any]) -> list[Any]:
    """Returns the values that a JSON Schema names; none where it names none."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def length_of_start(text: str, mark: str) -> int:
    """Returns the length of the longest end of `text` with which `mark` starts."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _from_tag(text: str) -> str:
    """Leaves out what stands before the next tag."""
    place = text.find("<", 1)
    return text[place:] if place > 0 else ""


def _as_json(value: str) -> str:
    value = _PYTHON_VALUES.get(value, value)
    try:
        json.loads(value, parse_constant=_refused)
    except (ValueError, RecursionError):
        return _quoted(value)
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _quoted(text)[1:-1]
