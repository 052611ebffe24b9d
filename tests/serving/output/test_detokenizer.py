"""Incremental text equals the whole text, whatever the tokens' borders."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.output.detokenizer import Detokenizer


def pieces(
    tokens: Sequence[bytes], stop: Sequence[str] = (), *, min_tokens: int = 0
) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(stop=stop, min_tokens=min_tokens)
    given_out = []
    for token in tokens:
        given_out.append(detokenizer.push(token))
        if detokenizer.stopped:
            return given_out, True
    given_out.append(detokenizer.finish())
    assert detokenizer.num_released_chars == len("".join(given_out))
    return given_out, detokenizer.stopped


def cut_at_first_complete_stop(
    text: str, stop: Sequence[str], *, after: int = 0
) -> tuple[str, bool]:
    """The definition, one character at a time."""
    for end in range(after + 1, len(text) + 1):
        ends = [s for s in stop if text[:end].endswith(s)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@given(st.binary() | st.text().map(str.encode), st.lists(st.integers(min_value=0)))
def test_any_bytes_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    text, stopped = pieces(split(data, cuts))
    assert "".join(text) == data.decode(errors="replace")
    assert not stopped


@given(
    st.text(alphabet="abé"),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(min_value=0)),
)
def test_stop_strings_across_any_borders(text: str, stop: list[str], cuts: list[int]) -> None:
    given_out, stopped = pieces(split(text.encode(), cuts), stop)
    assert ("".join(given_out), stopped) == cut_at_first_complete_stop(text, stop)


@given(
    st.text(alphabet="abé"),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(min_value=0)),
    st.integers(0, 5),
)
def test_stop_strings_within_the_fewest_tokens_do_not_count(
    text: str, stop: list[str], cuts: list[int], min_tokens: int
) -> None:
    tokens = split(text.encode(), cuts)
    uncut = len(b"".join(tokens[:min_tokens]).decode(errors="ignore"))
    given_out, stopped = pieces(tokens, stop, min_tokens=min_tokens)
    assert ("".join(given_out), stopped) == cut_at_first_complete_stop(text, stop, after=uncut)


def test_text_is_given_out_as_soon_as_it_is_final() -> None:
    euro = "€".encode()
    assert pieces([b"a", euro[:2], euro[2:], b"b"])[0] == ["a", "", "€", "b", ""]
    assert pieces([b"on", b"e\n", b"tw", b"o"], ["\n\n"])[0] == ["on", "e", "\ntw", "o", ""]


@pytest.mark.parametrize(
    ("tokens", "text"), [([b"x\n", b"\ny"], "x"), ([b"x", b"\n\n"], "x"), ([b"\n\n"], "")]
)
def test_a_stop_string_over_a_token_border_ends_the_text(tokens: list[bytes], text: str) -> None:
    given_out, stopped = pieces(tokens, ["\n\n"])
    assert "".join(given_out) == text
    assert stopped
