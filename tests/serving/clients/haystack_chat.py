"""Has a model answer and call by Haystack, in the clients' environment, and prints what happened as
JSON: URL MODEL, and the tokens that open a call and an answer."""

import json
import os
import sys
from typing import Any, Literal

url, model, call_token, answer_token = sys.argv[1:]
os.environ |= {"OPENAI_API_KEY": "none needed", "HAYSTACK_TELEMETRY_ENABLED": "False"}
from haystack.components.agents import Agent  # noqa: E402
from haystack.components.generators.chat import OpenAIChatGenerator  # noqa: E402
from haystack.dataclasses import ChatMessage  # noqa: E402
from haystack.tools import create_tool_from_function  # noqa: E402
from travel import Trip  # noqa: E402


def weather(city: Literal["Vienna", "Graz"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


tool = create_tool_from_function(weather)


AS_SCHEMA = {"name": "trip", "schema": Trip.model_json_schema(), "strict": True}


def generator(token: str, *, response_format: Any = Trip, **more: Any) -> OpenAIChatGenerator:
    """Its model begins with this token where it may."""
    asked = {
        "temperature": 0,
        "max_tokens": 200,
        "parallel_tool_calls": False,
        "response_format": response_format,
        "logit_bias": {token: 100},
    }
    to = {"model": model, "api_base_url": f"{url}/v1", "tools": [tool], "tools_strict": True}
    return OpenAIChatGenerator(**to, generation_kwargs=asked, **more)


question = [ChatMessage.from_system("Plan."), ChatMessage.from_user("the weather?")]
parts: list[str] = []
streaming = generator(
    call_token,
    response_format={"type": "json_schema", "json_schema": AS_SCHEMA},  # it streams no class
    streaming_callback=lambda part: parts.append(part.content),
)
agent = Agent(chat_generator=generator(call_token), tools=[tool], exit_conditions=["weather"])
messages = agent.run(messages=question)["messages"]
calls = [call.arguments for message in messages for call in message.tool_calls]
[after] = generator(answer_token).run(messages)["replies"]
print(
    json.dumps(
        {
            "called": calls,
            "streamed": [
                call.arguments for call in streaming.run(question)["replies"][0].tool_calls
            ],
            "num_parts": len(parts),
            "roles": [message.role for message in messages],
            "after": Trip.model_validate_json(after.text).model_dump(),
            "reason": after.meta["finish_reason"],
        }
    )
)
