"""Asks an endpoint by LangChain for answers that follow a schema, in the clients' environment, and
prints them as JSON: URL MODEL."""

import json
import sys
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field


class Trip(BaseModel):
    """A trip to one city. Other fields are forbidden: a random model may write them without end."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)
    guide: bool | None = None


url, model = sys.argv[1:]
to = {"base_url": f"{url}/v1", "api_key": "none needed", "model": model, "max_retries": 0}
chat = ChatOpenAI(**to, temperature=0, max_tokens=100, stream_usage=True)
structured = chat.with_structured_output(Trip)
strict = chat.with_structured_output(Trip, method="json_schema", strict=True, include_raw=True)
agent = create_agent(chat, tools=[], response_format=ProviderStrategy(Trip))
responding = ChatOpenAI(**to, temperature=0, max_tokens=100, use_responses_api=True)
question = {"messages": [{"role": "user", "content": "a trip"}]}
streamed = list(structured.stream("a trip"))
whole = strict.invoke("a trip")
answers = {
    "invoked": structured.invoke("a trip").model_dump(),
    "streamed": streamed[-1].model_dump(),
    "strict": whole["parsed"].model_dump(),
    "tokens": whole["raw"].usage_metadata["output_tokens"],
    "responding": responding.with_structured_output(Trip).invoke("a trip").model_dump(),
    "responding_stream": [*responding.with_structured_output(Trip).stream("a trip")][
        -1
    ].model_dump(),
    "agent": agent.invoke(question)["structured_response"].model_dump(),
}
print(json.dumps(answers))
