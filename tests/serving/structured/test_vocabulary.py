"""Which tokenizers can be held to a schema: those whose tokens write every character."""

import json
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.text.tokenizer import Tokenizer, train_bpe
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.vocabulary import Vocabulary
from tests.serving.structured.random_answers import answer_to
from tests.serving.structured.schema_cases import closed

PRINTABLE = [chr(code) for code in range(ord(" "), ord("~") + 1)]
SCHEMA = closed({"é": {"enum": ["Abc", "dé"]}, "n": {"type": "boolean"}})
GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def content_of(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens(["</s>"])
    return Tokenizer.from_json(backend.to_str().encode())


def byte_fallback() -> Tokenizer:
    """Llama 2's kind."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁{", "▁Abc", "true"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return content_of(backend)


def unigram(characters: list[str]) -> Tokenizer:
    """T5's kind."""
    words = [("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in characters if c != " ")]
    backend = tokenizers.Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return content_of(backend)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    words = ["[UNK]", *PRINTABLE[1:], *(f"##{c}" for c in "abc")]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece()
    return content_of(backend)


@pytest.mark.parametrize(
    "make",
    [
        lambda: train_bpe(["text"], vocab_size=257),
        lambda: train_bpe(["Text"], vocab_size=300, normalize=["lowercase"]),
        byte_fallback,
        lambda: unigram([*PRINTABLE, "é"]),
    ],
    ids=["byte level", "byte level that lowers letters", "byte fallback", "unigram"],
)
def test_answers_of_any_tokenizer_follow_a_schema(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for seed in range(3):
        answer = json.loads(answer_to(GRAMMAR, tokenizer, seed=seed))
        assert answer["é"] in ("Abc", "dé") and answer["n"] in (True, False)


@pytest.mark.parametrize(
    "make",
    [lambda: unigram([*"abcé"]), word_piece],
    ids=["unigram", "word piece"],
)
def test_a_tokenizer_without_some_characters_is_refused_by_name(
    make: Callable[[], Tokenizer],
) -> None:
    with pytest.raises(GrammarError, match=r"tokenizer has no token for .*such as '\{'"):
        Vocabulary(make())
