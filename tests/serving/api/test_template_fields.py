"""What a chat says to its template besides messages and tools, and long conversations, on a replica
without Ray."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from serving.protocol.errors import ApiError
from serving.protocol.template_fields import MAX_TEMPLATE_BYTES, TemplateFields
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.tiny_models import lively_model, write_model

TEMPLATE = """\
{{ messages | length }} {{ messages[-1].content }}\
{%- if enable_thinking is defined and enable_thinking is false %} SHORT{% endif -%}
{%- if reasoning_effort is defined %} {{ reasoning_effort }}{% endif -%}
{{ note if note is defined }}"""


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    chat = ChatFormat(TEMPLATE, "", tokenizer.end_of_text)
    talking = Tokenizer.from_json(tokenizer.to_json(), chat)
    folder = tmp_path_factory.mktemp("kwargs") / "step-1"
    with shared_replica(write_model(folder, lively_model(tokenizer), talking)) as run:
        yield run


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "tea"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 1, "return_token_ids": True}
    return await http.post("/v1/chat/completions", json=asked | fields)


def test_a_template_sees_its_kwargs_and_the_effort_and_nothing_else_changes(
    run: Run, tokenizer: Tokenizer
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        async def prompt(**fields: Any) -> str:
            ids = (await ask(http, **fields)).json()["prompt_token_ids"]
            assert tokenizer.eot_id not in ids, "a special token's text stays text"
            return tokenizer.decode(ids)

        plain = await prompt()
        assert plain == "1 tea"
        assert await prompt(chat_template_kwargs={"enable_thinking": False}) == "1 tea SHORT"
        assert await prompt(reasoning_effort="high") == "1 tea high"
        assert await prompt(reasoning_effort="none") == "1 tea SHORT none"
        said = {"enable_thinking": True, "reasoning_effort": "low"}
        assert await prompt(reasoning_effort="none", chat_template_kwargs=said) == "1 tea none"
        assert await prompt(chat_template_kwargs=said) == "1 tea low"
        assert await prompt(chat_template_kwargs={"other": {"a": [1]}, "self_": 2}) == plain
        note = {"note": tokenizer.end_of_text}
        assert await prompt(chat_template_kwargs=note) == f"1 tea{tokenizer.end_of_text}"

    run(check)


def test_2048_messages_are_read_and_one_more_is_refused(run: Run, tokenizer: Tokenizer) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        turns = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(2048)]
        ids = (await ask(http, messages=turns)).json()["prompt_token_ids"]
        assert tokenizer.decode(ids) == "2048 2047"
        for messages, words in (
            ([*turns, turns[0]], "2048"),
            ([turn | {"name": f"n{n}"} for n, turn in enumerate(turns)], "different names"),
        ):
            refused = await ask(http, messages=messages)
            error = refused.json()["error"]
            assert refused.status_code == 400 and error["param"] == "messages"
            assert words in error["message"]

    run(check)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({name: 1}, "set by the endpoint itself") for name in ("messages", "tools", "range")),
        ({"add_generation_prompt": False}, "set by the endpoint itself"),
        ({"": 1}, "no name of a variable"),
        ({"a b": 1}, "no name of a variable"),
        ({"__class__": 1}, "no name of a variable"),
        ({"a": "x" * MAX_TEMPLATE_BYTES}, f"at most {MAX_TEMPLATE_BYTES}"),
    ],
)
def test_kwargs_that_are_not_the_clients_are_refused_by_name(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        TemplateFields(chat_template_kwargs=given)
    assert caught.value.param == "chat_template_kwargs"


def test_what_a_template_refuses_is_the_clients_error(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for fields in (
            {"reasoning_effort": "very"},
            {"chat_template_kwargs": [1]},
            {"chat_template_kwargs": {f"a{n}": n for n in range(33)}},
        ):
            answer = await ask(http, **fields)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].startswith(next(iter(fields)))

    run(check)
