"""A client that renders the chat template itself and sends the text to /v1/completions or
/tokenize."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import processors

from model.text.chat import rendered
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from serving.text.reader import BoundedReader, TrustedReader
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.tiny_models import lively_model, write_model

BOS = "<s>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve fox?"}]
TEXT = rendered(ChatFormat(TEMPLATE, BOS, "<|im_end|>"), MESSAGES, asks=True)


def with_specials(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """Returns a tokenizer that puts BOS before a text, as Llama 3's does."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json().decode())
    backend.add_special_tokens([BOS, "<|im_start|>", "<|im_end|>"])
    bos = BOS, backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return Tokenizer(
        json.loads(backend.to_str()), template and ChatFormat(template, BOS, "<|im_end|>")
    )


@pytest.fixture(
    scope="module", params=[TEMPLATE, None], ids=["a template of its own", "no template"]
)
def served(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, Tokenizer]]:
    its_own = with_specials(tokenizer, request.param)
    folder = write_model(
        tmp_path_factory.mktemp("special") / "step-1", lively_model(its_own), its_own
    )
    with shared_replica(folder) as run:
        yield run, its_own


def ids_of_library(tokenizer: Tokenizer, text: str) -> list[int]:
    """What Hugging Face's library makes of a text by default, without BOS."""
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json().decode())
    return list(library.encode(text, add_special_tokens=False).ids)


def test_special_tokens_in_a_prompt_are_tokens_if_the_client_says_so(
    served: tuple[Run, Tokenizer],
) -> None:
    run, tokenizer = served
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": TEXT,
        "max_tokens": 1,
        "return_token_ids": True,
        "echo": True,
    }
    expected = ids_of_library(tokenizer, TEXT)

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        kind = TrustedReader if tokenizer.chat is None else BoundedReader
        assert isinstance(versions.live.texts, kind)

        async def prompt_ids(**fields: Any) -> list[int]:
            answer = await http.post("/v1/completions", json=asked | fields)
            assert answer.status_code == 200, answer.text
            [choice] = answer.json()["choices"]
            assert choice["text"].startswith(fields.get("prompt", TEXT)), (
                "the text as the client wrote it"
            )
            tokens = await http.post(
                "/tokenize", json={"prompt": TEXT} | {"add_special_tokens": True} | fields
            )
            assert tokens.json()["tokens"] == choice["prompt_token_ids"]
            return list(choice["prompt_token_ids"])

        assert await prompt_ids(parse_special=True) == expected, "and no second BOS"
        assert await prompt_ids(parse_special=True, add_special_tokens=False) == expected
        rest = TEXT.removeprefix(BOS)
        assert await prompt_ids(parse_special=True, prompt=rest) == expected
        assert (
            await prompt_ids(parse_special=True, prompt=rest, add_special_tokens=False)
            == expected[1:]
        )
        as_letters = await prompt_ids()
        assert as_letters == [tokenizer.bos_id, *tokenizer.encode(TEXT)] and len(as_letters) > len(
            expected
        )
        assert await prompt_ids(parse_special=False) == as_letters
        if tokenizer.chat is not None:
            chat = {
                "model": "tiny",
                "messages": MESSAGES,
                "max_tokens": 1,
                "return_token_ids": True,
            }
            answer = await http.post("/v1/chat/completions", json=chat | {"parse_special": False})
            assert answer.json()["prompt_token_ids"] == expected, (
                "the template of the server writes the same"
            )

    run(check)


def test_nobody_writes_special_tokens_into_a_message(served: tuple[Run, Tokenizer]) -> None:
    run, _ = served

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path, fields in (
            ("/v1/chat/completions", {"messages": MESSAGES}),
            ("/v1/embeddings", {"input": TEXT}),
        ):
            answer = await http.post(path, json={"model": "tiny", "parse_special": True} | fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
            assert error["param"] == "parse_special"

    run(check)
