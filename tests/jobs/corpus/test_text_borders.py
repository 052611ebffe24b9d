"""Borders: whatever a file is divided into, each line, record and stretch is found once and whole.

Long texts are encoded in pieces, with the same ids as in one go.
"""

import csv
import io
import random
import re
from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.corpus import text_borders
from jobs.corpus.text_borders import csv_lines, cut_stream, cut_text, lines, records
from model.text.tokenizer import train_bpe

contents = st.lists(
    st.sampled_from([b"\n", b"a", b"bc ", "ä語".encode(), b'"', b",", b"\r", b"x" * 30]),
    max_size=60,
).map(b"".join)


@given(contents, st.lists(st.integers(0, 400), max_size=4))
def test_ranges_together_give_each_line_once(content: bytes, borders: list[int]) -> None:
    cuts = sorted({0, len(content), *(border for border in borders if border < len(content))})
    found = [
        piece
        for start, end in pairwise(cuts)
        for piece in lines(io.BytesIO(content), start, end, limit=1000)
    ]
    assert [line for _, line, _ in found] == re.findall(rb"[^\n]*\n|[^\n]+", content)
    assert all(content[offset : offset + len(line)] == line for offset, line, _ in found)


@given(contents, st.integers(4, 40))
def test_a_line_over_the_limit_is_given_by_its_front(content: bytes, limit: int) -> None:
    found = list(lines(io.BytesIO(content), limit=limit))
    whole = content.split(b"\n")
    whole = [line + b"\n" for line in whole[:-1]] + ([whole[-1]] if whole[-1] else [])
    assert [line for _, line, _ in found] == [line[:limit] for line in whole]
    for (_, line, is_whole), expected in zip(found, whole, strict=True):
        assert is_whole == (line == expected and (len(line) < limit or line.endswith(b"\n")))


@given(contents, st.integers(10, 60))
def test_ranges_together_give_each_stretch_once(content: bytes, step: int) -> None:
    def cut(start: int, end: int) -> list[tuple[int, bytes]]:
        return list(cut_stream(io.BytesIO(content), start, end, step=step, slack=5))

    whole = list(cut_stream(io.BytesIO(content), 0, None, step=step, slack=5))
    assert b"".join(text for _, text in whole) == content
    assert max((len(text) for _, text in whole), default=0) <= step + 5
    ranges = [piece for start in range(0, len(content), step) for piece in cut(start, start + step)]
    assert ranges == whole
    front = content[: step + 3]
    rest = io.BytesIO(content)
    rest.seek(len(front))
    assert list(cut_stream(rest, 0, None, step=step, slack=5, front=front)) == whole


@given(contents)
def test_records_hold_the_rows_of_the_csv_reader_and_lose_nothing(content: bytes) -> None:
    found = list(records(io.BytesIO(content), limit=5000))
    assert b"".join(record.content for record in found) == content
    # What follows a quote that is never closed is read again.
    whole = list(takewhile(lambda record: record.is_whole, found))
    rows = [row for record in whole for row in rows_of(record.content)]
    assert len(rows) == len(whole)
    assert rows == rows_of(content)[: len(rows)]
    assert len(whole) < len(found) or rows == rows_of(content)


def rows_of(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


@given(contents, st.integers(20, 60))
def test_after_a_stray_quote_the_next_line_begins_a_record(content: bytes, limit: int) -> None:
    starts = {0, *(line_end.end() for line_end in re.finditer(rb"\r\n?|\n", content))} - {
        len(content)
    }
    found = list(records(io.BytesIO(content), limit=limit))
    ends = [record.offset + len(record.content) for record in found]
    covered = {
        start
        for record, end in zip(found, ends, strict=True)
        for start in starts
        if record.offset <= start < end
    }
    assert covered == starts  # every line is in a record
    assert all(record.offset in starts for record in found)


@given(contents, st.integers(3, 60), st.integers(1, 9))
def test_lines_of_csv_end_with_cr_lf_or_both_wherever_blocks_do(
    content: bytes, limit: int, block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_borders, "_BLOCK_BYTES", block_bytes)
        found = list(csv_lines(io.BytesIO(content), limit=limit))
    expected = re.findall(rb"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+", content)
    assert [line for _, line, _ in found] == [
        line if len(line.rstrip(b"\r\n")) < limit else line[:limit] for line in expected
    ]
    assert all(content[offset : offset + len(line)] == line for offset, line, _ in found)
    assert [is_whole for _, _, is_whole in found] == [
        len(line.rstrip(b"\r\n")) < limit for line in expected
    ]


@given(contents, st.integers(20, 60))
def test_records_that_begin_anew_are_the_same_without_what_was_before(
    content: bytes, limit: int
) -> None:
    found = list(records(io.BytesIO(content), limit=limit))
    for number, record in enumerate(found):
        if record.is_fresh and record.offset:
            rest = list(records(io.BytesIO(content[record.offset :]), limit=limit))
            moved = [other._replace(offset=other.offset + record.offset) for other in rest]
            assert moved == found[number:]


def test_lines_that_all_open_a_quote_are_read_twice_at_most() -> None:
    # Each closes the quote of the one before and opens its own
    content = b'"x","never closed\n' * 20_000
    found = list(records(io.BytesIO(content), limit=1 << 18))
    assert [record.content for record in found] == content.splitlines(keepends=True)
    assert not any(record.is_whole for record in found)


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
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_text_without_blanks_is_cut_all_the_same() -> None:
    text = "ab" * 1000
    pieces = list(cut_text(text, piece_chars=100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 200
    assert list(cut_text("short")) == ["short"]
