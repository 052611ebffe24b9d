"""Reads what an engine process says once it takes sequences."""

import json
from itertools import chain
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from serving.engine.messages import Admission, FinishReason, MetricFamily, StepReport, TokenEvent

_NUM_FIGURES = len(StepReport._fields) - 2  # between the events and the steps' times
_REASONS = {reason.value: reason for reason in FinishReason}

_any_report = TypeAdapter(StepReport).validate_json
_parse_admission = TypeAdapter(Admission).validate_python
_parse_metrics = TypeAdapter(list[MetricFamily]).validate_python


class MessageError(ValueError):
    """Bytes from an engine that are none of its messages."""


def parse_message(line: bytes) -> StepReport | Admission | list[MetricFamily]:
    """Returns a message. Raises `MessageError`."""
    try:
        if line.startswith(b"["):
            return parse_report(line)
        match _loaded(line):
            case {"admission": [[*admitted], int(running), int(waiting), [*found]]} if _are_whole(
                admitted
            ) and _are_whole(found):
                return Admission(admitted, running, waiting, found)
            case {"admission": fields}:
                return _parse_admission(fields)
            case {"metrics": families}:
                return _parse_metrics(families)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise MessageError(f"a message of another shape ({place}: {first['msg']})") from None
    except ValueError as error:
        raise MessageError(f"a line that is no JSON ({error})") from None
    raise MessageError(f"a message of no known kind ({line[:64]!r})")


def parse_report(line: bytes) -> StepReport:
    """Returns the report of steps. One whose events have tokens and ends alone, as nearly all, is
    checked in a fifth of pydantic's time. Raises `ValidationError`, or another `ValueError` for
    text that is no JSON."""
    match _loaded(line):
        case [[*tokens], *figures, [*steps_s]] if len(figures) == _NUM_FIGURES:
            are_numbers = {*map(type, chain(figures, steps_s))} <= {int, float}
            events = _plain_events(tokens) if are_numbers else None
            if events is not None:
                return StepReport._make([events, *figures, tuple(steps_s)])
    return _any_report(line)


def _plain_events(events: list[Any]) -> list[TokenEvent] | None:
    """Returns the events of a report if each is a sequence and its token, and perhaps its end."""
    if not {*map(type, events)} <= {list}:
        return None
    lengths = {*map(len, events)}
    if lengths <= {2}:
        return [TokenEvent(*event) for event in events] if _are_whole(chain(*events)) else None
    if not lengths <= {2, 3} or not _are_whole(chain(*(event[:2] for event in events))):
        return None
    plain = []
    for seq_id, token_id, *end in events:
        reason = _REASONS.get(str(end[0])) if end else None
        if end and reason is None:
            return None
        plain.append(TokenEvent(seq_id, token_id, reason))
    return plain


def _are_whole(numbers: Any) -> bool:
    return {*map(type, numbers)} <= {int}


def _loaded(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # also an infinite number, which Python's module writes
        return json.loads(line)
