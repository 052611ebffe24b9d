"""Each choice of a prompt has the prompt's log-probabilities; special tokens have them too, but are
no text."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.text.places import TextPlace
from model.text.tokenizer import Tokenizer
from serving.api.chat import ChatAnswer
from serving.engine.messages import Candidates, FinishReason, SequenceRequest, TokenEvent
from serving.output.answers import Answer, TextAnswer
from serving.output.choice_output import ChoiceOutput, ChoicePart, Texts, join_parts
from serving.protocol.protocol import CompletionRequest
from serving.protocol.served_model import ServedModel
from tests.serving.endpoint_parts import loopback_server, replica_app
from tests.tokenizer_kinds import tokenizer_json


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_each_choice_has_the_log_probabilities_of_the_prompt(
    checkpoint: Path, prompts: list[list[int]], prefix_cache: bool
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": prompts[6:],
        "echo": True,
        "logprobs": 2,
        "seed": 1,
    }
    asked |= {"max_tokens": 6, "ignore_eos": True}

    async def scenario() -> None:
        config = ServeConfig(engine=EngineConfig(max_num_seqs=8, prefix_cache=prefix_cache))
        async with (
            replica_app(checkpoint, name="tiny", config=config) as (app, _),
            loopback_server(app) as url,
            httpx.AsyncClient(base_url=url, timeout=None) as http,
        ):

            async def choices(**fields: Any) -> list[dict[str, Any]]:
                answer = await http.post("/v1/completions", json=asked | fields)
                assert answer.status_code == 200, answer.text
                return list(answer.json()["choices"])

            alone = await choices()
            for _ in range(2):  # the second time the cache has the prompts
                together = await choices(n=3)
                assert [together[0], together[3]["logprobs"]] == [alone[0], alone[1]["logprobs"]]
                for index, choice in enumerate(together):
                    num_prompt, expected = (
                        len(prompts[6 + index // 3]),
                        alone[index // 3]["logprobs"],
                    )
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                        assert choice["logprobs"][name][:num_prompt] == expected[name][:num_prompt]
                        assert len(choice["logprobs"][name]) == num_prompt + 6
            one_letter = next(
                token for token in together[1]["logprobs"]["tokens"][-4:] if token.isascii()
            )
            stopped = await choices(n=3, stop=[one_letter])
            assert len(stopped) == 6 and all(
                choice["finish_reason"] in ("stop", "length") for choice in stopped
            )

    asyncio.run(scenario())


def answered(
    tokenizer: Tokenizer, token_ids: list[int], *, prompt_ids: Sequence[int] = (1,), **fields: Any
) -> list[ChoicePart]:
    """The parts of a choice for which the engine draws these tokens."""
    prompt = [*prompt_ids]
    model = ServedModel("m", 1, GPTConfig(vocab_size=tokenizer.vocab_size), tokenizer, None, "v")
    request = CompletionRequest(model="m", prompt=[prompt], ignore_eos=True, **fields)
    sequence = SequenceRequest(0, prompt, len(token_ids), SamplingParams(), ignore_eos=True)
    output, parts = ChoiceOutput(0, sequence, request, model), []
    for place, token_id in enumerate(token_ids, start=1):
        reason = FinishReason.LENGTH if place == len(token_ids) else None
        parts.append(output.push(TokenEvent(0, token_id, reason, Candidates(-1.0, [], 1), None)))
        if parts[-1].finish_reason is not None:
            break
    return parts


def test_a_special_token_is_no_text_but_has_an_entry(tokenizer: Tokenizer) -> None:
    """As with `skip_special_tokens`, vLLM's default. The letters of its name are text."""
    the, fox, letters = (tokenizer.encode(text) for text in ("the", " fox", tokenizer.end_of_text))
    token_ids = [*the, tokenizer.eot_id, *fox, *letters, tokenizer.eot_id]
    parts = answered(tokenizer, token_ids, logprobs=0, return_token_ids=True)
    # Nothing is held back in a stream
    assert [len(part.tokens or []) for part in parts] == [1] * len(token_ids)
    whole = join_parts(parts)
    assert whole.text == f"the fox{tokenizer.end_of_text}" and whole.token_ids == token_ids
    entries = [(entry.token_id, entry.text_offset) for entry in whole.tokens or []]
    assert entries[len(the)] == (tokenizer.eot_id, 3) and entries[len(the) + 1] == (fox[0], 3)
    assert entries[-1] == (tokenizer.eot_id, len(whole.text))


def test_a_special_token_that_is_a_stop_string_stops(tokenizer: Tokenizer) -> None:
    the, fox = tokenizer.encode("the"), tokenizer.encode(" fox")
    for stop in (tokenizer.end_of_text, "e f"):
        parts = answered(tokenizer, [*the, tokenizer.eot_id, *fox], stop=stop)
        expected = "the" if stop == tokenizer.end_of_text else "th"
        assert (join_parts(parts).text, parts[-1].finish_reason) == (expected, FinishReason.STOP)


@pytest.mark.parametrize("kind", ["llama-2", "mistral", "unigram", "wordpiece"])
def test_an_answer_in_tokens_that_mark_words_keeps_the_blank_of_what_it_continues(
    kind: str,
) -> None:
    tokenizer = Tokenizer.from_json(tokenizer_json(kind))
    begin = [tokenizer.start_id]
    ids = tokenizer.encode("the lazy dog")
    alone = join_parts(answered(tokenizer, ids, prompt_ids=begin, logprobs=0))
    assert alone.text == "the lazy dog"
    prompt = [*begin, *tokenizer.encode("A quick")]
    for token_ids in (ids, [tokenizer.eot_id, *ids]):  # a special token is no text
        after = join_parts(answered(tokenizer, token_ids, prompt_ids=prompt))
        assert after.text == " the lazy dog"
    echoed = join_parts(answered(tokenizer, ids, prompt_ids=prompt, echo=True, max_tokens=9))
    assert echoed.text == "A quick the lazy dog"


def test_a_character_of_several_byte_tokens_arrives_whole() -> None:
    tokenizer = Tokenizer.from_json(tokenizer_json("llama-2"))
    ids = tokenizer.encode("fox 🙂!", TextPlace.INSIDE)
    parts = answered(tokenizer, ids, prompt_ids=tokenizer.encode("the"))
    assert "".join(part.text for part in parts) == "fox 🙂!"
    assert "🙂" in [part.text for part in parts]


@pytest.mark.parametrize("shape", [TextAnswer, ChatAnswer])
@pytest.mark.parametrize("kind", ["our own", "llama-2", "wordpiece"])
def test_tokens_given_out_by_their_texts_make_the_same_answer_byte_by_byte(
    shape: type[Answer], kind: str, tokenizer: Tokenizer
) -> None:
    """Special tokens, characters of several tokens, ends of lines, and what JSON escapes."""
    if kind != "our own":
        tokenizer = Tokenizer.from_json(tokenizer_json(kind))
    model = ServedModel("m", 1, GPTConfig(vocab_size=tokenizer.vocab_size), tokenizer, None, "v")
    request = CompletionRequest(model="m", prompt=[[1]], stream=True)
    text = tokenizer.encode('the "fox" 🙂\u2028 naïve\\ \x85 dog')
    token_ids = [*text, tokenizer.eot_id, *text[:-1], *text, *tokenizer.encode("the") * 9]
    sequence = SequenceRequest(0, [1], len(token_ids), SamplingParams())
    events = [TokenEvent(0, token_id) for token_id in token_ids]
    events[-1] = events[-1]._replace(finish_reason=FinishReason.LENGTH)
    answer = shape(model)
    one_by_one = ChoiceOutput(3, sequence, request, model)
    expected = [answer.sent([one_by_one.push(event)], None) for event in events]

    for size in (1, 3):  # events that come together
        sent, num_texts = [], 0
        output = ChoiceOutput(3, sequence, request, model, as_texts=True)
        for start in range(0, len(events), size):
            some = events[start : start + size]
            texts = output.texts_of(some)
            num_texts += texts is not None
            if texts is None:
                sent += [answer.sent([output.push(event)], None) for event in some]
            else:
                sent.append(answer.sent_texts(texts))
        # A chat's first event has a role, which this answer has given to the first choice above
        assert b"".join(sent[1:]) == b"".join(expected[1:])
        assert output.num_output_tokens == len(events)
        assert num_texts == len(range(0, len(events), size)) - 2  # all but the first and the last
    together = Texts(3, ["the", '"\u2028', "🙂"])
    assert answer.sent_texts(together) == b"".join(
        answer.sent_texts(Texts(3, [each])) for each in together.texts
    )


@pytest.mark.parametrize("fields", [{"stop": "x"}, {"logprobs": 0}, {"return_token_ids": True}])
def test_a_token_of_which_more_is_asked_than_its_text_is_not_given_out_by_it(
    tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    model = ServedModel("m", 1, GPTConfig(vocab_size=tokenizer.vocab_size), tokenizer, None, "v")
    sequence, event = SequenceRequest(0, [1], 9, SamplingParams()), TokenEvent(0, 5)
    for asked, is_text in ((fields, False), ({}, True)):
        request = CompletionRequest(model="m", prompt=[[1]], **asked)
        output = ChoiceOutput(0, sequence, request, model, as_texts=True)
        assert output.texts_of([event]) is None  # the first says more
        output.push(event)
        assert (output.texts_of([event]) is not None) is is_text
