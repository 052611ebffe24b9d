"""Tokenizers of other kinds than ours: ids are transformers', text comes back as `tokenizers`
decodes it, and what cannot be given out token by token is refused by its name."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from model.config import GPTConfig
from model.files.checkpoint import descriptions
from model.files.stored_tokenizer import load_tokenizer
from model.text.bulk_encoder import bulk_encoder
from model.text.chat import Chat, format_to_train
from model.text.chat_format import ChatFormat
from model.text.places import TextPlace
from model.text.token_bytes import TokenizerError
from model.text.tokenizer import Tokenizer
from tests.checkpoints import metadata_of
from tests.tokenizer_kinds import KINDS, SPECIALS, TEMPLATE, tokenizer_json

TEXTS = (
    "the quick brown fox",
    "Hello there, what  is the answer?",
    " leading and trailing ",
    "two\nlines\n\nand\ttabs",
)
OF_ANY_BYTES = ("llama-2", "mistral", "gemma")
TURNS = [
    {"role": "user", "content": "what is the answer?"},
    {"role": "assistant", "content": "a word"},
    {"role": "user", "content": "hello <|end|> fox"},
    {"role": "assistant", "content": "the lazy dog"},
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mine(kind: str) -> Tokenizer:
    return Tokenizer.from_json(tokenizer_json(kind), ChatFormat(TEMPLATE, "<s>", "<eos>"))


@pytest.fixture(scope="module")
def library(kind: str) -> PreTrainedTokenizerFast:
    """transformers' own, from the same file."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json(kind).decode())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<eos>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def test_ids_of_texts_are_transformers(mine: Tokenizer, library: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        assert mine.encode_whole(text) == library(text)["input_ids"]
        assert mine.encode(text) == library(text, add_special_tokens=False)["input_ids"]
    assert (mine.end_of_text, mine.eot_id) == ("<eos>", library.eos_token_id)
    assert mine.bos_id == library.bos_token_id
    assert mine.vocab_size == len(library)


def test_ids_of_a_conversation_are_transformers(
    mine: Tokenizer, library: PreTrainedTokenizerFast
) -> None:
    turns = [turn for turn in TURNS if "<|end|>" not in turn["content"]]
    asked = library.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert Chat(mine).prompt_ids(turns) == asked


def test_answers_of_a_conversation_continue_what_was_asked(mine: Tokenizer) -> None:
    chat = Chat(mine, format_to_train(mine))
    ids, counted = chat.conversation(TURNS)
    first = counted.index(True)
    assert ids[:first] == chat.prompt_ids(TURNS[:1])
    answer = [token_id for token_id, counts in zip(ids, counted, strict=True) if counts]
    ends = [place for place, token_id in enumerate(answer) if token_id == chat.end_of_turn]
    texts = [mine.decode(answer[: ends[0]]), mine.decode(answer[ends[0] + 1 : ends[1]])]
    assert texts == ["a word", "the lazy dog"]
    assert ids.count(mine.special_ids["<|end|>"]) == len(TURNS)  # and not a fifth, of a message


def test_text_of_tokens_is_the_librarys(mine: Tokenizer) -> None:
    backend, draw = mine.backend, random.Random(0)
    usual = [i for i in range(mine.vocab_size) if i not in mine.special_ids.values()]
    whole = [i for i in usual if "\ufffd" not in mine.decode([i])]
    drawn = [draw.choices(usual, k=8) for _ in range(200)]
    of_whole = [draw.choices(whole, k=8) for _ in range(200)]
    num_compared = 0
    for ids in [*map(mine.encode, TEXTS), *drawn, *of_whole]:
        expected = backend.decode(ids, skip_special_tokens=False)
        if "\ufffd" in expected or "<unk>" in expected:
            continue  # for bytes that are no character it has as many marks as bytes
        num_compared += 1
        assert mine.decode(ids) == expected
        stream = DecodeStream(skip_special_tokens=False)
        parts = [stream.step(backend, token_id) for token_id in ids]
        streamed = "".join(part for part in parts if part)
        assert expected.startswith(streamed.lstrip()) or streamed == expected
    assert num_compared > 200


def test_text_that_continues_keeps_its_blank(kind: str, mine: Tokenizer) -> None:
    ids = mine.encode("the quick fox")
    place = next(i for i in range(1, len(ids)) if mine.decode(ids[i:], continues=True)[0] == " ")
    front, rest = mine.decode(ids[:place]), mine.decode(ids[place:], continues=True)
    assert front + rest == "the quick fox"
    if kind != "gemma":  # which has no mark that a first token would lose
        assert mine.decode(ids[place:]) == rest[1:]


def test_a_text_in_pieces_has_the_ids_of_the_whole(mine: Tokenizer) -> None:
    encoder, reason = bulk_encoder(mine)
    assert reason == "its tokens are not byte-level BPE's"
    pieces = ["the quick", " brown fox", " jumps"]
    ids = [token_id for part in encoder.encode_pieces(pieces) for token_id in part.tolist()]
    assert ids == mine.encode("".join(pieces))
    assert mine.encode("the") == mine.encode("the", TextPlace.START)


@pytest.mark.parametrize("kind", OF_ANY_BYTES, indirect=True)
def test_bytes_that_are_no_token_come_back(mine: Tokenizer) -> None:
    text = "naïve 東京 🙂\u0000"
    ids = mine.encode(text)
    assert mine.decode(ids) == text
    assert b"".join(map(mine.token_bytes, ids)).endswith(text[1:].encode())
    assert mine.token_bytes(mine.encode("🙂")[-1]) == "🙂".encode()[-1:]


def test_a_tokenizer_is_stored_byte_for_byte(kind: str, mine: Tokenizer, tmp_path: Path) -> None:
    content = tokenizer_json(kind)
    assert mine.hash == hashlib.sha256(content).hexdigest()
    config = GPTConfig(vocab_size=mine.vocab_size, n_positions=64)
    for name, written in descriptions(config, mine, metadata_of(1)).items():
        (tmp_path / name).write_bytes(written)
    assert (tmp_path / "tokenizer.json").read_bytes() == content
    again = load_tokenizer(tmp_path)
    assert again is not None and again.hash == mine.hash and again.chat == mine.chat
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs("the quick fox")["input_ids"] == again.encode_whole("the quick fox")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "decoder has BPEDecoder"),
        (
            {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
            "decoder has Strip",
        ),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Fuse"},
                        {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
                    ],
                }
            },
            "Replace, which comes after Fuse",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "its decoder does not read them",
        ),
    ],
)
def test_what_has_no_text_token_by_token_is_refused(parts: dict[str, Any], message: str) -> None:
    content = json.loads(tokenizer_json("gemma")) | parts
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(content)


def test_without_a_token_that_ends_a_text_it_is_refused() -> None:
    content = tokenizer_json("gemma").replace(b"<eos>", b"<pad>")
    with pytest.raises(TokenizerError, match=r"has no <\|endoftext\|> token, .* as </s> or <eos>"):
        Tokenizer.from_json(content)
    assert "<eos>" in SPECIALS
