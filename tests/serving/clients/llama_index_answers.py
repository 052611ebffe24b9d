"""Asks an endpoint by LlamaIndex, in an environment of its own, and prints the answers as JSON: URL
MODEL."""

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """A trip to one city."""

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)


url, model = sys.argv[1:]
to = {"model": model, "api_base": f"{url}/v1", "api_key": "none needed", "max_retries": 0}
plain = OpenAILike(**to, temperature=0, max_tokens=12)
chat = OpenAILike(
    **to,
    temperature=0,
    max_tokens=100,
    is_chat_model=True,
    should_use_structured_outputs=True,
)
history = [ChatMessage(role="system", content="be brief"), ChatMessage(content="tea?")]
prompt = PromptTemplate("a trip to {country}")
print(
    json.dumps(
        {
            "text": plain.complete("the quick").text,
            "streamed_text": "".join(
                part.delta or "" for part in plain.stream_complete("the quick")
            ),
            "chat": chat.chat(history).message.content,
            "streamed_chat": "".join(part.delta or "" for part in chat.stream_chat(history)),
            "predicted": chat.structured_predict(Trip, prompt, country="Austria").model_dump(),
            "as_structured": chat.as_structured_llm(Trip).chat(history).raw.model_dump(),
        }
    )
)
