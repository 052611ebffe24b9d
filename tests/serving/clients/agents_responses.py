"""Runs agents of OpenAI's Agents SDK by its default route at an endpoint, in the clients' environment,
and prints what they did as JSON: URL MODEL, and the token that opens an answer."""

import asyncio
import json
import os
import sys
from typing import Any, Literal

from agents import Agent, ModelSettings, RunConfig, Runner, function_tool
from openai import BadRequestError
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

url, model, answer_token = sys.argv[1:]
os.environ |= {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none needed"}
# Which would send each run to OpenAI
run_config = RunConfig(tracing_disabled=True)
# No random model ends by itself, or calls a tool
ending = ModelSettings(temperature=0, max_tokens=900, extra_body={"stop": ["e"]})
calling = ModelSettings(
    temperature=0,
    max_tokens=900,
    tool_choice="required",
    parallel_tool_calls=False,
    extra_body={"logit_bias": {answer_token: 100}},
)
greedy = ModelSettings(temperature=0, max_tokens=900)
called: list[str] = []


class Trip(BaseModel):
    city: Literal["Vienna", "Graz"]
    days: Literal[1, 2, 3]


@function_tool
def weather(city: Literal["Vienna", "Graz"], days: Literal[1, 2]) -> str:
    """Tells the weather of a city."""
    called.append(f"{city} {days}")
    return f"rain in {city}"


async def streamed(agent: Agent[Any], question: str) -> dict[str, Any]:
    result = Runner.run_streamed(agent, question, run_config=run_config)
    text = ""
    kinds = []
    async for event in result.stream_events():
        kinds.append(event.type)
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            text += event.data.delta
    return {"text": text, "final": result.final_output, "kinds": sorted({*kinds})}


async def refusal() -> str:
    agent = Agent(name="plain", model=model)
    try:
        await Runner.run(agent, "x", previous_response_id="resp_1", run_config=run_config)
    except BadRequestError as error:
        return error.message
    return ""


async def main() -> None:
    plain = Agent(name="plain", instructions="be brief", model=model, model_settings=ending)
    first = await Runner.run(plain, "tea?", run_config=run_config)
    turns = [*first.to_input_list(), {"role": "user", "content": "and?"}]
    second = await Runner.run(plain, turns, run_config=run_config)
    planner = Agent(name="planner", model=model, model_settings=greedy, output_type=Trip)
    trip = await Runner.run(planner, "a trip", run_config=run_config)
    # After its call an agent may choose, and so writes what follows the schema
    guide = Agent(
        name="guide", model=model, model_settings=calling, output_type=Trip, tools=[weather]
    )
    guided = await Runner.run(guide, "a trip", run_config=run_config)
    usage = guided.context_wrapper.usage
    from_stream = await streamed(guide, "a trip")
    told = {
        "first": first.final_output,
        "second": second.final_output,
        "streamed": await streamed(plain, "tea?"),
        "trip": trip.final_output.model_dump(),
        "guided": guided.final_output.model_dump(),
        "guided_items": [item.type for item in guided.new_items],
        "guided_requests": [usage.requests, usage.input_tokens > 0, usage.output_tokens > 0],
        "guided_stream": from_stream | {"final": from_stream["final"].model_dump()},
        "called": called,
        "refusal": await refusal(),
    }
    print(json.dumps(told))


asyncio.run(main())
