"""No document depends on how a file is cut: whole, cut at any size, and as an archive of one or two
members."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings.data import DataConfig
from cluster.storage.uris import open_storage
from jobs.corpus.chunks import Chunk, Part, is_divisible, plan_chunks, whole_file
from jobs.corpus.documents import read_documents
from jobs.corpus.file_pieces import _part, cut_file
from jobs.corpus.listing import list_corpus
from raymill.errors import UserError

# Text, reason to drop it, and whether bytes were replaced; or an error.
Outcome = list[tuple[str, str | None, bool]] | str
MARK = b"\xef\xbb\xbf"
WHOLE = 1 << 24
Pack = Callable[[bytes], bytes]


def outcome(
    content: bytes, ending: str, *, shard_bytes: int, most_bytes: int, invalid_utf8: str = "replace"
) -> Outcome:
    """Returns the documents of a file that is cut as the stage cuts it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "texts", f"a.{ending}")
        path.parent.mkdir()
        path.write_bytes(content)
        source = {
            "source": str(path.parent),
            "shard_bytes": shard_bytes,
            "max_document_bytes": most_bytes,
        }
        data = DataConfig.model_validate(source | {"invalid_utf8": invalid_utf8})
        [file] = list_corpus(data.source).files
        pieces: dict[int, list[Part]] = {}
        store = open_storage(folder).child("store")
        try:
            if file.size > shard_bytes and not is_divisible(file):
                key = cut_file(Chunk(0, 0, [whole_file(file)]), store=store, data=data).decode()
                pieces[0] = [
                    _part(file, store.child(key).uri, entry)
                    for entry in store.child(key).entries("0")
                ]
            chunks = plan_chunks([file], pieces, data)
            documents = [
                found
                for chunk in chunks
                for part in chunk.parts
                for found in read_documents(part, data)
            ]
        except UserError as error:
            return type(error).__name__
    return [(found.text, found.drop, found.replaced) for found in documents]


def packed(content: bytes, place: int) -> dict[str, bytes]:
    """Returns the content by ending: as it is, in one member, and in two that border at `place`."""
    halves = (content[:place], content[place:])
    return {
        "": content,
        ".gz": gzip.compress(content, 1),
        ".zst": zstandard.compress(content, 1),
        ".gz#": b"".join(gzip.compress(half, 1) for half in halves),
        ".zst#": b"".join(zstandard.compress(half, 1) for half in halves),
    }


BITS = [
    MARK,
    b"\r\n",
    b"\n",
    b"\r",
    b'"',
    b'""',
    b",",
    b'"a, ""b"" c"',
    b"word ",
    b" ",
    "é漢".encode(),
]
HOSTILE_BITS = [
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "\u2028".encode(),
    b"\x1a",
    b"\x85",
    b"\\",
    b"{",
    b"}",
]
noise = st.lists(st.sampled_from([*BITS, *HOSTILE_BITS]), max_size=40).map(b"".join)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Makes csv whose rows each have a line end of their own."""
    header = draw(
        st.sampled_from([b"id,text", b"text", b'"text","i\rd"', b'"te\nxt",text', b"text,"])
    )
    content = draw(st.sampled_from([b"", MARK, MARK + MARK])) + header
    for number in range(draw(st.integers(0, 12))):
        cell = draw(noise)
        quoted = b'"' + cell.replace(b'"', b'""') + b'"'
        content += draw(st.sampled_from([b"\r", b"\n", b"\r\n"]))
        content += b"%d," % number + (quoted if draw(st.booleans()) else cell)
    return content + draw(st.sampled_from([b"", b"\n", b"\r"]))


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    lines = []
    for _ in range(draw(st.integers(0, 12))):
        text = draw(noise)
        good = json.dumps(
            {"text": text.decode(errors="surrogateescape")}, ensure_ascii=draw(st.booleans())
        )
        line = draw(
            st.sampled_from([good.encode(errors="surrogateescape"), text.replace(b"\n", b"")])
        )
        lines.append(
            draw(st.sampled_from([b"", b"", MARK]))
            + line
            + draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
        )
    return b"".join(lines)


CASES = [("csv", tables()), ("jsonl", json_lines()), ("txt", noise)]


@pytest.mark.parametrize(("kind", "contents"), CASES, ids=[kind for kind, _ in CASES])
def test_documents_are_the_same_whole_and_cut_at_any_size(
    kind: str, contents: st.SearchStrategy[bytes]
) -> None:
    @settings(max_examples=60)
    @given(
        content=contents,
        shard_bytes=st.integers(1, 300),
        place=st.integers(0, 400),
        most_bytes=st.sampled_from([40, 1000]),
        invalid_utf8=st.sampled_from(["replace", "skip", "fail"]),
    )
    def check(
        content: bytes, shard_bytes: int, place: int, most_bytes: int, invalid_utf8: str
    ) -> None:
        options = {"most_bytes": most_bytes, "invalid_utf8": invalid_utf8}
        expected = outcome(content, kind, shard_bytes=WHOLE, **options)  # type: ignore[arg-type]
        for pack, stored in packed(content, place).items():
            ending = f"{kind}{pack.rstrip('#')}"
            assert outcome(stored, ending, shard_bytes=shard_bytes, **options) == expected, pack  # type: ignore[arg-type]

    check()


def rows(numbers: range, line_end: bytes) -> bytes:
    return b"".join(b"%d,document number %d%s" % (number, number, line_end) for number in numbers)


@pytest.mark.parametrize("shard_bytes", [WHOLE, 60, 1])
def test_a_header_that_ends_with_cr_is_no_longer_than_its_row(shard_bytes: int) -> None:
    content = b"id,text\r" + rows(range(5), b"\r") + rows(range(5, 10), b"\n")
    found = outcome(content, "csv", shard_bytes=shard_bytes, most_bytes=1000)
    assert found == [(f"document number {number}", None, False) for number in range(10)]


@pytest.mark.parametrize("shard_bytes", [WHOLE, 70, 20])
def test_a_mark_within_joined_lines_is_no_part_of_a_document(shard_bytes: int) -> None:
    line_of = [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(6)]
    content = gzip.compress(b"".join([MARK, *line_of[:3], MARK, *line_of[3:], MARK]))
    found = outcome(content, "jsonl.gz", shard_bytes=shard_bytes, most_bytes=1000)
    assert found == [(f"document {number}", None, False) for number in range(6)]


@pytest.mark.parametrize(("ending", "head"), [("jsonl.gz", b""), ("csv", b"text\n")])
def test_one_document_larger_than_a_shard_is_not_lost(ending: str, head: bytes) -> None:
    text = "word " * 100
    line = text.encode() if head else json.dumps({"text": text}).encode()
    content = head + line + b"\n"
    stored = gzip.compress(content) if ending.endswith("gz") else content
    assert outcome(stored, ending, shard_bytes=10, most_bytes=1000) == [(text, None, False)]


def test_rows_of_a_file_whose_lines_end_with_cr_are_read_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of many rows is no line over the limit."""
    monkeypatch.setattr("jobs.corpus.documents._LINE_MARGIN_BYTES", 100)
    content = b"id,text\r" + rows(range(400), b"\r")
    for shard_bytes in (WHOLE, 500):
        assert len(outcome(content, "csv", shard_bytes=shard_bytes, most_bytes=50)) == 400
