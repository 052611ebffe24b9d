"""A base model's chat over HTTP ends where the next speaker's turn would begin, whoever that is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, shared_replica

# Which even a model without any sense writes, if it draws nothing but this and line ends
NAME = ":"
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "name": NAME, "content": "tea?"},
    {"role": "user", "content": "fox"},
]
LINE = f"\n{NAME}:"
RENDERED = f"System:\nbe brief\n{NAME}:\ntea?\nUser:\nfox\nAssistant:\n"


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    with shared_replica(checkpoint) as run:
        yield run


def drawing(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Returns fields by which a model draws the letters of a text in any order, and nothing
    else."""
    ids = {token_id for letter in text for token_id in tokenizer.encode(letter)}
    bias = dict.fromkeys(map(str, ids), 100)
    return {"model": "tiny", "logit_bias": bias, "temperature": 2, "max_tokens": 60, "seed": 1}


def test_a_named_speakers_line_ends_the_answer(run: Run, tokenizer: Tokenizer) -> None:
    asked = drawing(tokenizer, "\n:")

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        free = (await http.post("/v1/completions", json=asked | {"prompt": RENDERED})).json()[
            "choices"
        ][0]["text"]
        assert LINE in free and "\nUser:" not in free
        answer = await http.post("/v1/chat/completions", json=asked | {"messages": MESSAGES})
        [choice] = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (
            free[: free.index(LINE)],
            "stop",
        )
        unnamed = [message | {"name": None} for message in MESSAGES]
        [other] = (
            await http.post("/v1/chat/completions", json=asked | {"messages": unnamed})
        ).json()["choices"]
        assert other["finish_reason"] == "length", "nobody of this name takes part"

    run(check)
