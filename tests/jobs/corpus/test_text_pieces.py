"""Long texts are encoded in pieces: the same ids as in one go."""

import random

import pytest

from jobs.corpus.text_borders import cut_text
from model.tokenizer import train_bpe


@pytest.mark.parametrize("normalize", [(), ("nfc", "lowercase", "collapse_spaces")])
def test_pieces_have_the_ids_of_the_whole(normalize: tuple[str, ...]) -> None:
    rng = random.Random(1)
    words = [
        "Straße",
        "naïve",
        "don't",
        "end.",
        "\n\n",
        "\t",
        " ",
        "   ",
        "x1",
        "42",
        "...",
        "你好",
        "😀",
        "e\u0301",
        "\r\n",
    ]
    text = "".join(rng.choice(words) + rng.choice(["", " ", " ", "\n"]) for _ in range(20_000))
    tokenizer = train_bpe([text[:20_000]], vocab_size=400, normalize=normalize)
    pieces = list(cut_text(text, piece_chars=100))
    assert len(pieces) > 300
    assert max(map(len, pieces)) <= 200
    assert "".join(pieces) == text
    assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)


def test_a_text_without_blanks_is_cut_all_the_same() -> None:
    text = "ab" * 1000
    pieces = list(cut_text(text, piece_chars=100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 200
    assert list(cut_text("short")) == ["short"]
