"""tiktoken's core gives the ids of `tokenizers` for every vocabulary it accepts; the others are
refused."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from model.text import bulk_encoder as module
from model.text.bulk_encoder import BulkEncoder, NotExpressibleError, PlainEncoder, bulk_encoder
from model.text.token_bytes import TokenizerError
from model.text.tokenizer import Tokenizer, train_bpe

Edit = Callable[[dict[str, Any]], object]

MIXTURE = module._MIXTURE
GPT4_PATTERN = module._PIECES["gpt-4"] + module._BLANK_PIECES
SCRIPTS = {
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0x61, 0x7A), (0xC0, 0x17F), (0x1E00, 0x1EFF)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x4FF)],
    "Hebrew": [(0x591, 0x5F4)],
    "Arabic": [(0x600, 0x6FF)],
    "Devanagari": [(0x900, 0x97F)],
    "Thai": [(0xE01, 0xE5B)],
    "Hangul": [(0x1100, 0x11FF), (0xAC00, 0xD7A3)],
    "CJK": [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x20000, 0x20FFF)],
    "emoji": [(0x1F300, 0x1F9FF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF)],
    "marks": [(0x61, 0x7A), (0x300, 0x36F)],
    "digits": [(0x30, 0x39), (0x660, 0x669), (0x2160, 0x2188)],
    "signs": [(0x21, 0x2F), (0x3A, 0x40), (0x2000, 0x206F), (0x3000, 0x303F)],
    "controls": [(0, 0x1F), (0x7F, 0x9F), (0xE000, 0xE010), (0xFFF0, 0xFFFD)],
    "code": [(0x20, 0x7E)],
}
BREAKS = [
    *"      ",
    "  ",
    " " * 40,
    "\n",
    "\n\n",
    "\r\n",
    "\t\t",
    " \n \t",
    "\u00a0",
    "\u3000",
    "'",
    "'s ",
    "'LL ",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Words in several scripts, some of them common; over 400 kB."""
    rng = random.Random(0)

    def word(ranges: list[tuple[int, int]]) -> str:
        return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 9)))

    common = [word(ranges) for ranges in SCRIPTS.values() for _ in range(30)]
    pool = [*common * 4, *(word(ranges) for ranges in SCRIPTS.values() for _ in range(1500))]
    made = ["".join(rng.choice(pool) + rng.choice(BREAKS) for _ in range(500)) for _ in range(60)]
    assert sum(len(text.encode()) for text in made) > 400_000
    return made


@pytest.fixture(scope="module")
def trained(texts: list[str], corpus: list[str]) -> Tokenizer:
    return train_bpe([*texts[:40], *corpus[:6]], vocab_size=2500)


def edited(tokenizer: Tokenizer, edit: Edit) -> Tokenizer:
    content = json.loads(tokenizer.to_json())
    edit(content)
    return Tokenizer(content)


def split(pattern: str) -> Edit:
    before = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_after = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return lambda content: content.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [before, bytes_after]}
    )


def permute_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(1).shuffle(ids)
    content["model"]["vocab"] = dict(zip(vocab, ids, strict=True))


def list_every_split(content: dict[str, Any]) -> None:
    """Adds merges as in Llama 3's file, which was converted from tiktoken's."""
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    content["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in made
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    content["model"]["ignore_merges"] = True
    assert len(content["model"]["merges"]) > len(merges) + 100


def merge_in_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]


def add_a_token_that_its_bytes_do_not_make(content: dict[str, Any]) -> None:
    """In qzq, the earlier merge qz leaves no zq that q could join."""
    add_merges(content, ("q", "z"), ("z", "q"), ("q", "zq"))


def add_merges(content: dict[str, Any], *pairs: tuple[str, str]) -> None:
    vocab = content["model"]["vocab"]
    for left, right in pairs:
        content["model"]["merges"].append([left, right])
        vocab.setdefault(left + right, 3000 + len(vocab))


VARIANTS: dict[str, Edit] = {
    "trained": lambda content: None,
    "GPT-2's pattern": split(module._PIECES["gpt-2"] + module._BLANK_PIECES),
    "GPT-4's pattern": split(GPT4_PATTERN),
    "Qwen's pattern": split(module._PIECES["qwen"] + module._BLANK_PIECES),
    "GPT-4o's pattern": split(module._PIECES["gpt-4o"] + module._BLANK_PIECES),
    "permuted ids": permute_ids,
    "merges as text": merge_in_text,
    "every split, merges ignored": list_every_split,
    "a token that is never made": add_a_token_that_its_bytes_do_not_make,
    "options for bytes that no vocabulary of ours lacks": lambda content: content["model"].update(
        unk_token="a", byte_fallback=True, fuse_unk=True
    ),
}


@pytest.mark.more
@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_tokenizers(
    variant: str, trained: Tokenizer, texts: list[str], corpus: list[str]
) -> None:
    tokenizer = edited(trained, VARIANTS[variant])
    encoder, reason = bulk_encoder(tokenizer)
    assert reason is None
    assert isinstance(encoder, BulkEncoder)
    some = [*texts, *corpus[:10], "", "qzq zqzq qzqzq"]
    for text in some:
        encoded, ids = encoder.encode(text), tokenizer.encode(text)
        assert encoded.dtype == np.uint32
        assert encoded.tolist() == ids
        assert tokenizer.eot_id not in ids


@pytest.mark.more
@pytest.mark.parametrize(
    "normalize",
    [["nfc"], ["lowercase"], ["collapse_spaces"], ["nfc", "lowercase", "collapse_spaces"]],
)
def test_normalizers_run_first(normalize: list[str], texts: list[str]) -> None:
    tokenizer = train_bpe(texts[:20], vocab_size=1000, normalize=normalize)
    encoder, reason = bulk_encoder(tokenizer, sample=texts[:2])
    assert reason is None
    for text in texts:
        assert encoder.encode(text).tolist() == tokenizer.encode(text)


@pytest.fixture(scope="module")
def patterns(trained: Tokenizer) -> list[tuple[BulkEncoder, Tokenizer]]:
    tokenizers = [
        trained,
        *(edited(trained, VARIANTS[f"{name}'s pattern"]) for name in ("GPT-4", "Qwen", "GPT-4o")),
    ]
    return [(BulkEncoder(tokenizer), tokenizer) for tokenizer in tokenizers]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*MIXTURE, "<|endoftext|>"]))))
def test_any_text(patterns: list[tuple[BulkEncoder, Tokenizer]], parts: list[str]) -> None:
    text = "".join(parts)
    for encoder, tokenizer in patterns:
        assert encoder.encode(text).tolist() == tokenizer.encode(text)


def test_both_regex_engines_have_the_same_letters_numbers_and_blanks() -> None:
    characters = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64)]
    text = "".join(map(chr, characters))
    ranks = {bytes([byte]): byte for byte in range(256)}
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        pieces = pre_tokenizers.Split(Regex(kind), "removed", invert=True).pre_tokenize_str(text)
        encoding = tiktoken.Encoding(
            "class", pat_str=kind, mergeable_ranks=ranks, special_tokens={}
        )
        members = bytes(encoding.encode_ordinary(text)).decode()
        assert members == "".join(piece for piece, _ in pieces)
        assert len(members) >= 25


@pytest.mark.more
@pytest.mark.parametrize("unit", ["a", " ", "\n", "7", ".", "漢", " \n", "<|endoftext|>"])
def test_a_megabyte_without_a_border(unit: str, trained: Tokenizer) -> None:
    text = unit * (1_100_000 // len(unit))
    start = time.process_time()
    ids = BulkEncoder(trained).encode(f"x{text}x")
    assert time.process_time() - start < 10  # what is quadratic takes hours
    assert trained.decode(ids.tolist()) == f"x{text}x"
    assert ids.tolist() == trained.encode(f"x{text}x")


@pytest.mark.parametrize("normalize", [[], ["nfc"]])
def test_a_lone_surrogate_is_refused_as_by_the_tokenizer(normalize: list[str]) -> None:
    encoder, _ = bulk_encoder(train_bpe(["hello"], vocab_size=300, normalize=normalize))
    with pytest.raises(TokenizerError, match="lone surrogate"):
        encoder.encode("a\ud800b")


def bpe(**options: Any) -> Edit:
    return lambda content: content["model"].update(options)


def merge_one_token_twice(content: dict[str, Any]) -> None:
    add_a_token_that_its_bytes_do_not_make(content)
    add_merges(content, ("j", "j"), ("qz", "q"))


REFUSED: list[tuple[Edit, str]] = [
    (bpe(dropout=0.1), "dropout=0.1"),
    (lambda content: content.update(pre_tokenizer=None), "another pattern than GPT-2's"),
    (
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        "another pattern than GPT-2's",
    ),
    (
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        "another pattern than GPT-2's",
    ),
    (
        lambda content: content["added_tokens"][0].update(special=False),
        "added tokens that are not special",
    ),
    (
        lambda content: (
            add_a_token_that_its_bytes_do_not_make(content),
            bpe(ignore_merges=True)(content),
        ),
        "ignore_merges",
    ),
    (merge_one_token_twice, "one token at two priorities"),
    (lambda content: content["model"]["vocab"].pop("ÿ"), "1 of the 256 bytes"),
    (split(r"\w+|\W"), "another pattern than GPT-2's"),
    (split(GPT4_PATTERN.replace("(?i:", "(?:")), "another pattern than GPT-2's"),
]


@pytest.mark.parametrize(
    ("edit", "reason"), REFUSED, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(REFUSED)]
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(
    edit: Edit, reason: str, trained: Tokenizer
) -> None:
    with pytest.raises(NotExpressibleError, match=reason) as refusal:
        BulkEncoder(edited(trained, edit))
    assert "\n" not in str(refusal.value)


def test_prefix_and_suffix_are_refused(trained: Tokenizer) -> None:
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        content = json.loads(trained.to_json())["model"] | {option: "##"}
        with pytest.raises(NotExpressibleError, match=option):
            module._made_tokens(content)


def test_the_fallback_gives_the_same_ids_and_says_why(trained: Tokenizer, texts: list[str]) -> None:
    tokenizer = edited(trained, split(r"\w+|\W"))
    encoder, reason = bulk_encoder(tokenizer)
    assert type(encoder) is PlainEncoder
    assert reason is not None and "another pattern than GPT-2's" in reason
    for text in ("", *texts[:5]):
        encoded = encoder.encode(text)
        assert (encoded.dtype, encoded.tolist()) == (np.uint32, tokenizer.encode(text))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda tokens: [token for token in tokens if token != "Ġthe"],
        lambda tokens: [*tokens[:256], *tokens[:255:-1]],
    ],
)
def test_the_proof_catches_a_wrong_merge_table(
    tamper: Callable[[list[str]], list[str]], trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module._made_tokens
    monkeypatch.setattr(module, "_made_tokens", lambda content: tamper(right(content)))
    encoder, reason = bulk_encoder(trained)
    assert type(encoder) is PlainEncoder
    assert reason is not None and "other ids than `tokenizers` around" in reason


def test_the_sample_is_part_of_the_proof(
    trained: Tokenizer, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_proof_texts", lambda tokenizer: [])
    monkeypatch.setattr(module, "_pattern", lambda pre_tokenizer: GPT4_PATTERN)
    assert bulk_encoder(trained, sample=["nothing that tells the two patterns apart"])[1] is None
    encoder, reason = bulk_encoder(trained, sample=["fine", *corpus[:1]])
    assert type(encoder) is PlainEncoder
    assert reason is not None and "other ids than `tokenizers` around" in reason
