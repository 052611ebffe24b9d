"""Has a model call by LangGraph and smolagents, and answer by Outlines, in the clients' environment,
and prints what happened as JSON: URL MODEL, and the tokens that open a call and an answer."""

import json
import sys
from typing import Literal

import openai
import outlines
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from outlines.types import Regex
from smolagents import OpenAIServerModel, ToolCallingAgent
from smolagents import tool as small_tool
from travel import Trip

url, model, call_token, answer_token = sys.argv[1:]
to = {"base_url": f"{url}/v1", "api_key": "none needed"}


@tool
def weather(city: Literal["Vienna", "Graz"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


@small_tool
def sky(days: int) -> str:
    """The sky.

    Args:
        days: how many days from now
    """
    return "rain"


def chat(token: str) -> ChatOpenAI:
    """Its model begins with this token where it may."""
    asked = {"model_kwargs": {"parallel_tool_calls": False}, "logit_bias": {int(token): 100}}
    return ChatOpenAI(**to, model=model, temperature=0, max_tokens=200, **asked)


def graph_messages() -> list[str]:
    calling = chat(call_token).bind_tools([weather], response_format=Trip, strict=True)
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [calling.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([weather]))
    graph.add_edge(START, "model")
    graph.add_edge("model", "tools")
    ran = graph.compile().invoke({"messages": [("user", "the weather?")]})
    return [message.type for message in ran["messages"]]


def small_steps() -> list[str]:
    server = OpenAIServerModel(
        model,
        api_base=to["base_url"],
        api_key=to["api_key"],
        max_tokens=200,
        temperature=0,
        parallel_tool_calls=False,
    )
    agent = ToolCallingAgent(tools=[sky], model=server, max_steps=1, verbosity_level=0)
    agent.run("the sky?")
    return [
        call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or []
    ]


client = openai.OpenAI(**to)
by_schema, by_vllm = outlines.from_openai(client, model), outlines.from_vllm(client, model)
agent = create_agent(chat(answer_token), tools=[weather], response_format=ProviderStrategy(Trip))
planned = agent.invoke({"messages": [("user", "a trip")]})["structured_response"]
print(
    json.dumps(
        {
            "graph": graph_messages(),
            "agent": planned.model_dump(),
            "small": small_steps(),
            "outlines": [
                by_schema("a trip", Trip, max_tokens=100),
                by_vllm("a trip", Trip, max_tokens=100),
            ],
            "choice": by_vllm("tea?", Literal["yes", "no"], max_tokens=20),
            "digits": by_vllm("a number", Regex("[0-9]{3}"), max_tokens=20),
        }
    )
)
