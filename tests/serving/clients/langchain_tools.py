"""Has a model call tools by LangChain, in the clients' environment, and prints what happened as
JSON: URL MODEL."""

import functools
import json
import operator
import sys
from collections.abc import Callable
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from travel import Trip


@tool
def weather(city: Literal["Vienna", "Graz"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


@wrap_model_call
def calls_once(
    request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]
) -> ModelResponse:
    """No random model would call by itself, nor end."""
    has_called = any(isinstance(message, ToolMessage) for message in request.messages)
    choice = "auto" if has_called else "any"
    return handler(request.override(tool_choice=choice, model_settings={"strict": True}))


url, model = sys.argv[1:]
to = {"base_url": f"{url}/v1", "api_key": "none needed", "model": model, "max_retries": 0}
chat = ChatOpenAI(**to, temperature=0, max_tokens=200)
alone = {"parallel_tool_calls": False}
forced = chat.bind_tools([weather], tool_choice="weather", strict=True, **alone)
streamed = functools.reduce(operator.add, forced.stream("the weather?"))
question = {"messages": [{"role": "user", "content": "the weather?"}]}
one_call = ChatOpenAI(**to, temperature=0, max_tokens=200, model_kwargs=alone)
agent = create_agent(one_call, tools=[weather], middleware=[calls_once])
messages = agent.invoke(question)["messages"]
planner = create_agent(one_call, tools=[], response_format=ToolStrategy(Trip))
structured = chat.with_structured_output(Trip, method="function_calling", **alone)
print(
    json.dumps(
        {
            "called": [call["args"] for call in forced.invoke("the weather?").tool_calls],
            "streamed": [call["args"] for call in streamed.tool_calls],
            "agent": [
                [message.type, message.content if not isinstance(message, AIMessage) else ""]
                for message in messages
            ],
            "planner": planner.invoke(question)["structured_response"].model_dump(),
            "structured": structured.invoke("a trip").model_dump(),
        }
    )
)
