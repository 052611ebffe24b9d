"""Normalized text and hashed runs of words, against plain Python."""

import hashlib
import sys
import unicodedata

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.corpus.text_hashes import document_hash, is_blank, ngrams_by_text, normalized, word_ngrams

UNSPACED = "中文とテ。กขລཀကខ𠀀"
texts = st.text(
    st.one_of(
        st.sampled_from("aB \t\n\x1c\x85\u00a0\u2003\u3000éßİ" + UNSPACED),
        st.characters(codec="utf-8"),
    )
)
words = st.lists(st.text(st.sampled_from("ab" + UNSPACED), min_size=1, max_size=12), max_size=12)


@given(texts)
@example("".join(map(chr, range(0xD800))))
def test_normalized_is_nfc_case_folded_and_split_at_white_space(text: str) -> None:
    assert (
        normalized(text) == " ".join(unicodedata.normalize("NFC", text).casefold().split()).encode()
    )


def test_every_white_space_of_unicode_is_a_blank() -> None:
    for char in map(chr, range(sys.maxunicode + 1)):
        if char.isspace():
            assert normalized(f"{char}a{char}{char}B{char}") == b"a b", repr(char)


@given(st.text(st.sampled_from(" \n\x1f\xa0\u3000\ufeff\u200ba"), max_size=6))
def test_a_text_of_blanks_and_invisible_characters_is_blank(text: str) -> None:
    assert is_blank(text.encode()) == ("a" not in text)


def test_what_is_not_blank_has_a_normalized_text() -> None:
    nothing_assigned = range(0x40000, 0xE0000, 64)
    for char in map(
        chr,
        [
            *range(0xD800),
            *range(0xE000, 0x40000),
            *nothing_assigned,
            *range(0xE0000, sys.maxunicode + 1),
        ],
    ):
        assert is_blank(char.encode()) or normalized(char), repr(char)


def test_equal_but_for_case_blanks_and_form_is_equal() -> None:
    composed, decomposed = normalized("Café  au\u00a0Lait\r\n"), normalized("\ncafe\u0301 AU lait")
    assert composed == decomposed == "café au lait".encode()
    assert document_hash(composed) == hashlib.sha256(composed).digest()[:16]
    assert normalized(" \n") == b""


def reference_words(text: str) -> list[str]:
    """A character of `UNSPACED` is a word; other words end at blanks, and at 64 bytes."""
    spaced = "".join(f" {char} " if char in UNSPACED else char for char in text)
    return [
        word[first : first + 64] for word in spaced.split() for first in range(0, len(word), 64)
    ]


@given(st.lists(words, min_size=1, max_size=6), st.integers(1, 5))
@example([["a" * 63, "a" * 64, "a" * 65, "a" * 129, "b" * 64 + "a"]], 1)
@example([["中a中", "a", "𠀀a𠀀𠀀", "กa"]], 2)
def test_runs_have_equal_hashes_exactly_if_their_words_are_equal(
    word_lists: list[list[str]], n: int
) -> None:
    runs, hashes = [], []
    for text in (" ".join(word_list) for word_list in word_lists):
        expected = reference_words(text)
        size = min(n, len(expected))
        runs += [
            tuple(expected[start : start + size])
            for start in range(len(expected) - size + 1)
            if size
        ]
        hashes += word_ngrams(text.encode(), n).tolist()
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))


def test_order_borders_and_length_count() -> None:
    variants = [
        b"ab c d",
        b"a bc d",
        b"c ab d",
        b"ab c d d",
        b"ab c",
        b"abcd",
        b"abc d",
        b"a",
        b"aa",
        b"a a",
    ]
    assert len({word_ngrams(text, 8)[0] for text in variants}) == len(variants)


def test_hashes_are_the_same_in_every_process_and_on_every_machine() -> None:
    assert word_ngrams("to be, or not; 中文".encode(), 3).tolist() == [
        12809617666315287113,
        9306339578506937603,
        6649391806013501304,
        7287830514087520944,
    ]


def test_no_collisions_and_even_bits_among_many_runs() -> None:
    text = " ".join(map(str, range(100_000))).encode()
    hashes = word_ngrams(text, 2)
    assert len(np.unique(hashes)) == len(hashes) == 99_999
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / len(hashes) ** 0.5


def test_an_insertion_into_text_without_blanks_changes_only_the_runs_across_it() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    before, after = (word_ngrams(normalized(t), 3) for t in (text, text[:250] + "新" + text[250:]))
    assert len(np.setdiff1d(before, after)) == 2


def test_a_blob_without_blanks_is_cut_into_words() -> None:
    assert len(word_ngrams(b"x" * 1_000_000 + b" end", 1)) == 1_000_000 // 64 + 1


@given(st.lists(st.text("ab 中\u3000", max_size=20), max_size=8), st.integers(1, 4))
def test_many_texts_at_once_have_the_hashes_of_each_alone(texts: list[str], n: int) -> None:
    prepared = [normalized(text) for text in texts]
    hashes, places = ngrams_by_text(prepared, n)
    for place, text in enumerate(prepared):
        assert hashes[places == place].tolist() == word_ngrams(text, n).tolist()
    assert len(hashes) == sum(len(word_ngrams(text, n)) for text in prepared)
