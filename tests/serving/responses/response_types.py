"""What OpenAI's client says a response and its stream are, which every answer has to be."""

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_output_item import ResponseOutputItem
from pydantic import TypeAdapter

_EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}
_ITEM: TypeAdapter[Any] = TypeAdapter(ResponseOutputItem)
_LAST = {"response.completed", "response.incomplete"}


def checked(response: dict[str, Any]) -> dict[str, Any]:
    """Returns a response that the client's types accept."""
    Response.model_validate(response, strict=True)
    for item in response["output"]:
        _ITEM.validate_python(item, strict=True)
    assert response["store"] is False and response["id"].startswith("resp_")
    return response


def events_of(stream: str) -> list[dict[str, Any]]:
    """Returns the events of a whole stream, each of which the client's types accept, by number."""
    *blocks, rest = stream.split("\n\n")
    assert rest == "" and "[DONE]" not in stream
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        _EVENTS[event["type"]].model_validate(event, strict=True)
        events.append(event)
    return events


def streamed(stream: str) -> dict[str, Any]:
    """Returns the last response of a stream that ends well, once it is what the pieces before it
    add up to."""
    created, in_progress, *events, last = events_of(stream)
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    assert created["response"]["status"] == "in_progress" and created["response"]["output"] == []
    assert last["type"] in _LAST and last["type"] == f"response.{last['response']['status']}"
    items: list[dict[str, Any]] = []
    for event in events:
        _take(items, event)
    assert items == last["response"]["output"]
    fixed = ("id", "created_at", "model", "tools", "tool_choice", "text", "metadata")
    assert all(created["response"][name] == last["response"][name] for name in fixed)
    return checked(last["response"])


def _take(items: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Applies an event to the items, as a client does."""
    place, kind = event["output_index"], event["type"].removeprefix("response.")
    if kind == "output_item.added":
        assert place == len(items) and event["item"]["status"] == "in_progress"
        items.append(event["item"])
        return
    item = items[place]
    assert place == len(items) - 1 and event.get("item_id", item["id"]) == item["id"]
    match kind:
        case "content_part.added":
            item["content"].append(event["part"])
        case "output_text.delta":
            assert event["delta"] or event["logprobs"]
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] += event["logprobs"]
        case "output_text.done":
            assert item["content"][0]["text"] == event["text"]
            assert item["content"][0]["logprobs"] == event["logprobs"]
        case "content_part.done":
            assert item["content"] == [event["part"]]
        case "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "function_call_arguments.done":
            assert (item["name"], item["arguments"]) == (event["name"], event["arguments"])
        case "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"] and item["status"] in ("completed", "incomplete")
        case _:
            raise AssertionError(kind)


def said(response: dict[str, Any]) -> list[Any]:
    """Returns what an answer's items say and call, without what is new each time."""
    return [
        item["content"][0]["text"]
        if item["type"] == "message"
        else (item["name"], item["arguments"])
        for item in response["output"]
    ]
