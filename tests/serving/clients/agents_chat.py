"""Runs agents of OpenAI's Agents SDK on an endpoint's chats, in the clients' environment, and prints
what happened as JSON: URL MODEL, and the tokens that open a call and an answer."""

import asyncio
import json
import os
import sys
from typing import Any, Literal

url, model, call_token, answer_token = sys.argv[1:]
os.environ |= {
    "OPENAI_API_KEY": "none needed",
    "OPENAI_BASE_URL": f"{url}/v1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_api  # noqa: E402
from openai.types.shared import Reasoning  # noqa: E402
from travel import Trip  # noqa: E402

set_default_openai_api("chat_completions")
called: list[str] = []


@function_tool
def weather(city: Literal["Vienna", "Graz"]) -> str:
    """The weather of a city."""
    called.append(city)
    return f"rain in {city}"


def agent(token: str, **settings: Any) -> Agent[Any]:
    """An agent whose model begins with this token where it may: a random one would do either."""
    asked = {"logit_bias": {token: 100}}
    plan = ModelSettings(temperature=0, max_tokens=200, parallel_tool_calls=False, extra_body=asked)
    return Agent(
        name="planner",
        instructions="Plan.",
        model=model,
        model_settings=plan,
        tools=[weather],
        output_type=Trip,
        **settings,
    )


async def main() -> dict[str, Any]:
    answer = await Runner.run(agent(answer_token), "a trip")
    once = await Runner.run(agent(call_token, tool_use_behavior="stop_on_first_tool"), "weather?")
    history = [*once.to_input_list(), {"role": "user", "content": "a trip, then"}]
    after = await Runner.run(agent(answer_token), history)
    streamed = Runner.run_streamed(agent(answer_token), "a trip")
    num_events = len([event async for event in streamed.stream_events()])
    effort = ModelSettings(reasoning=Reasoning(effort="low"), max_tokens=8)
    thinker = Agent(name="thinker", model=model, model_settings=effort)
    return {
        "answer": answer.final_output.model_dump(),
        "called": called,
        "items": [item.type for item in once.new_items],
        "after": after.final_output.model_dump(),
        "streamed": streamed.final_output.model_dump(),
        "num_events": num_events,
        "thought": isinstance((await Runner.run(thinker, "tea?")).final_output, str),
    }


print(json.dumps(asyncio.run(main())))
