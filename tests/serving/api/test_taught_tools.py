"""A model that was taught to call a tool in its format calls it by itself, and answers once it has
what came of the call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from model.config import GPTConfig
from model.gpt import GPT
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.chat import Chat
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from serving.protocol.tool_fields import Tool
from tests.serving.endpoint_parts import shared_replica
from tests.serving.tiny_models import write_model
from tests.serving.tools.templates import (
    HERMES_TEMPLATE,
    LLAMA_TEMPLATE,
    MISTRAL_ARGS_TEMPLATE,
    QWEN_CODER_TEMPLATE,
)

pytestmark = pytest.mark.slow  # trains

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": PARAMETERS},
}
QUESTION = {"role": "user", "content": "How is it in Graz?"}
GREETING = {"role": "user", "content": "Hello"}
CALLS = {
    HERMES_TEMPLATE: '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>',
    QWEN_CODER_TEMPLATE: (
        "<tool_call>\n<function=weather>\n<parameter=city>\nGraz\n</parameter>\n</function>\n</tool_call>"
    ),
    MISTRAL_ARGS_TEMPLATE: '[TOOL_CALLS]weather[ARGS]{"city": "Graz"}',
    LLAMA_TEMPLATE: '{"name": "weather", "parameters": {"city": "Graz"}}',
}
NUM_STEPS = 150


def history(call_id: str) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": json.dumps({"city": "Graz"})}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "rain"},
    ]


def taught(tokenizer: Tokenizer, template: str) -> GPT:
    """A small model that knows three prompts and the answer to each by heart."""
    chat = Chat(tokenizer, ChatFormat(template, "", tokenizer.end_of_text))
    seen = [Tool.model_validate(TOOL).seen]
    after_call: list[dict[str, Any]] = history("call_1")
    after_call[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Graz"}
    lessons = [
        ([QUESTION], CALLS[template]),
        ([GREETING], "Good day."),
        (after_call, "It rains."),
    ]
    rows = [
        (chat.prompt_ids(messages, seen), [*tokenizer.encode(answer), tokenizer.eot_id])
        for messages, answer in lessons
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = {"n_positions": length + 128, "n_layer": 2, "n_head": 2, "n_embd": 64}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    gpt.init_weights(1)
    inputs, targets = (torch.zeros(len(rows), length - 1, dtype=torch.long) for _ in range(2))
    targets.fill_(IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor(prompt + answer)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        gpt.loss(inputs, targets, scale=1 / 60).backward()
        optimizer.step()
    return gpt.eval()


@pytest.mark.parametrize(
    "template", CALLS, ids=["Hermes", "Qwen3-Coder", "Mistral with [ARGS]", "Llama"]
)
def test_a_model_calls_a_tool_by_itself(
    template: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chat = ChatFormat(template, "", tokenizer.end_of_text)
    taught_tokenizer = Tokenizer.from_json(tokenizer.to_json(), chat)
    folder = write_model(tmp_path / "taught", taught(tokenizer, template), taught_tokenizer)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        client = openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="none", http_client=http
        )

        async def answer(messages: Sequence[dict[str, Any]]) -> Any:
            asked: dict[str, Any] = {"messages": [*messages], "tools": [TOOL]}
            completion = await client.chat.completions.create(
                model="tiny", temperature=0, max_tokens=120, **asked
            )
            return completion.choices[0]

        choice = await answer([QUESTION])
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Graz"}
        assert (await answer([GREETING])).message.content == "Good day."
        last = await answer(history(call.id))
        assert (last.message.content, last.finish_reason) == ("It rains.", "stop")

    with shared_replica(folder) as run:
        run(check)
