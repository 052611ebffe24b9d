"""Where in a text a piece of it stands, as some tokenizers mark the front of a text with a blank.

A text is encoded in pieces: between special tokens, which nothing in a message may become, and
where a document is long. A mark before a piece that continues a text would be a blank that the text
does not have.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

Step = Mapping[str, Any]
"""A normalizer, pre-tokenizer or decoder of a tokenizer.json."""


class TextPlace(Enum):
    """The text before a piece."""

    START = "nothing"
    AFTER_SPECIAL = "a special token"
    INSIDE = "text"


def steps_of(part: Step | None, members: str) -> list[Step]:
    """Returns the steps of a part of tokenizer.json, whose sequences have their `members`."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps: list[Step] = []
    for member in part[members]:
        steps += steps_of(member, members)
    return steps


def content_at(place: TextPlace, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer.json that encodes a piece at a place: without what would mark its front,
    which `tokenizers` does where it knows of no text before it."""
    if place is TextPlace.START:
        return {**content}
    parts = {
        "normalizer": _changed(content.get("normalizer"), "normalizers", _normalizer_at(place)),
        "pre_tokenizer": _changed(
            content.get("pre_tokenizer"), "pretokenizers", _pre_tokenizer_at(place)
        ),
    }
    return {**content, **{name: part for name, part in parts.items() if name in content}}


def _normalizer_at(place: TextPlace) -> Callable[[Step], Step | None]:
    def changed(step: Step) -> Step | None:
        if place is not TextPlace.INSIDE:
            return step
        match step["type"]:
            case "Prepend":
                return None
            case "Strip":  # would join words
                return {**step, "strip_left": False}
            case _:
                return step

    return changed


def _pre_tokenizer_at(place: TextPlace) -> Callable[[Step], Step | None]:
    def changed(step: Step) -> Step | None:
        if step["type"] != "Metaspace":
            return step
        older = "always" if step.get("add_prefix_space", True) else "never"
        is_marked = (
            step.get("prepend_scheme", older) == "always" and place is TextPlace.AFTER_SPECIAL
        )
        return {
            "type": "Metaspace",
            "replacement": step["replacement"],
            "prepend_scheme": "always" if is_marked else "never",
            "split": step.get("split", True),
        }

    return changed


def _changed(part: Step | None, members: str, change: Callable[[Step], Step | None]) -> Step | None:
    """Returns a part of tokenizer.json whose steps are changed, or left out where that is None."""
    if part is None:
        return None
    if part["type"] != "Sequence":
        return change(part)
    steps = [_changed(member, members, change) for member in part[members]]
    return {**part, members: [step for step in steps if step is not None]}
