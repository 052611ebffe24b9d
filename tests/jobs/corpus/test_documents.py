"""Readers: every ending gives the same documents, unusable ones are named by reason, damaged files
stop the job."""

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.settings.data import DataConfig
from cluster.storage.uris import ConflictError, NotFoundError, StorageError, open_storage
from jobs.corpus.chunks import Chunk, plan_chunks, whole_file
from jobs.corpus.documents import Document, Drop, read_documents
from jobs.corpus.file_pieces import cut_file
from jobs.corpus.listing import CorpusError, list_corpus, most_is_skipped, said_skipped
from tests.cluster.fault_proxy import running_proxy

TEXTS = [
    "first document\r\nwith two lines\n",
    "zweites Dokument: ÄÖÜ 你好 😀",
    "  third, blanks kept  ",
]

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(uri: Path | str, **settings: Any) -> list[Document]:
    return list(read_documents(whole_file(list_corpus(str(uri)).files[0]), DataConfig(**settings)))


def read_in_chunks(
    uri: Path | str, *, shard_bytes: int, max_document_bytes: int = 1 << 20
) -> list[Document]:
    """Returns the documents of all parts of the file, of which there must be several."""
    files = list_corpus(str(uri)).files
    data = DataConfig(shard_bytes=shard_bytes, max_document_bytes=max_document_bytes)
    parts = [part for chunk in plan_chunks(files, {}, data) for part in chunk.parts]
    assert len(parts) > 1
    return [document for part in parts for document in read_documents(part, data)]


def kept(path: Path, **settings: Any) -> list[str]:
    return [document.text for document in read(path, **settings) if not document.drop]


def drops(path: Path, **settings: Any) -> list[Drop | None]:
    return [document.drop for document in read(path, **settings)]


def write_lines(path: Path, lines: list[bytes | dict[str, Any]]) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


@pytest.mark.parametrize("ending", PACKERS)
def test_jsonl_and_its_archives(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus.jsonl{ending}"
    lines = b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in TEXTS)
    path.write_bytes(PACKERS[ending](lines))
    documents = read(path)
    assert [document.text for document in documents] == TEXTS


@pytest.mark.parametrize("ending", PACKERS)
def test_txt_and_its_archives(tmp_path: Path, ending: str) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{ending}").write_bytes(PACKERS[ending](text.encode()))
    listing = list_corpus(str(tmp_path))
    assert [kept(Path(entry.uri)) for entry in listing.files] == [[text] for text in TEXTS]


def test_archives_of_several_members_are_read_to_the_end(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(
            b"".join(PACKERS[ending](json.dumps({"text": text}).encode() + b"\n") for text in TEXTS)
        )
        assert kept(path) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    texts = [*TEXTS, None, *(f"row {number}" for number in range(1000))]
    columns = {"text": texts, "label": texts, "number": list(range(len(texts)))}
    table = pa.table(
        columns,
        schema=pa.schema(
            {
                "text": pa.string(),
                "label": pa.dictionary(pa.int32(), pa.string()),
                "number": pa.int64(),
            }
        ),
    )
    pq.write_table(table, path, row_group_size=300)
    documents = read(path)
    assert [document.text for document in documents if not document.drop] == [
        text for text in texts if text
    ]
    assert documents[3] == Document(3, drop=Drop.MISSING_TEXT)
    assert read(path, text_field="label") == documents
    assert read_in_chunks(path, shard_bytes=2000) == documents
    with pytest.raises(
        CorpusError, match=r"no column 'body'; set data.text_field to one of text, label, number"
    ):
        read(path, text_field="body")
    with pytest.raises(CorpusError, match=r"'number' of .* holds int64, not strings"):
        read(path, text_field="number")


def test_a_parquet_column_of_nothing_but_nulls_is_missing_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert drops(tmp_path / "a.parquet") == [Drop.MISSING_TEXT] * 3


def test_reasons_to_drop_a_text_file(tmp_path: Path) -> None:
    contents = {
        Drop.EMPTY: b"",
        Drop.BINARY: b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        None: b"x" * 100,
    }
    for reason, content in contents.items():
        path = tmp_path / f"{reason}.txt"
        path.write_bytes(content)
        assert drops(path, max_document_bytes=100) == [reason]
    for blank in (
        " \n\t\r\n ",
        "\u3000\u3000",
        "\u00a0",
        "\ufeff\ufeff",
        "\u200b\n\u2060 ",
        "\x1c",
    ):
        path.write_text(blank)
        assert drops(path) == [Drop.EMPTY], repr(blank)
    path.write_bytes("UTF-16 text".encode("utf-16"))
    assert drops(path) == [Drop.BINARY]


def test_reasons_to_drop_a_line(tmp_path: Path) -> None:
    lines: list[tuple[bytes | dict[str, Any], Drop | None]] = [
        ({"text": "good"}, None),
        (b'{"text": "no end', Drop.INVALID_JSON),
        (b"[" * 100_000, Drop.INVALID_JSON),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", Drop.INVALID_JSON),
        (b'{"text": "x", "n": NaN}', None),
        (b'["text"]', Drop.MISSING_TEXT),
        ({"text": None}, Drop.MISSING_TEXT),
        ({"text": 7}, Drop.MISSING_TEXT),
        ({"title": "x"}, Drop.MISSING_TEXT),
        ({"text": ""}, Drop.EMPTY),
        ({"text": "\u0000"}, Drop.BINARY),
        (b"\x00\x01", Drop.BINARY),
        ({"text": "y" * 201_000}, Drop.TOO_LONG),
        ({"text": "a", "other": "z" * 4_000_000}, Drop.TOO_LONG),
        ({"text": "last, without a line end"}, None),
    ]
    path = write_lines(tmp_path / "a.jsonl", [line for line, _ in lines])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    documents = read(path, max_document_bytes=200_000)
    assert [document.drop for document in documents] == [reason for _, reason in lines]
    assert read_in_chunks(path, shard_bytes=50_000, max_document_bytes=200_000) == documents


def test_a_conversation_of_very_many_messages_is_too_long(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turn * 500}, {"messages": turn * 501}])
    assert drops(path, format="chat") == [None, Drop.TOO_LONG]


def test_the_text_parts_of_a_message_are_its_text(tmp_path: Path) -> None:
    """As OpenAI's format has them; a part that is no text makes the message none."""
    text, image = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}
    turns = [[text, {"type": "text", "text": "b"}], [text, image], [], [{"type": "text"}]]
    lines = [
        {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": "c"}]}
        for turn in turns
    ]
    found = read(write_lines(tmp_path / "a.jsonl", lines), format="chat")
    assert found[0].messages == (
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    )
    assert [document.drop for document in found[1:]] == [Drop.NO_MESSAGES] * 3


def test_hidden_folders_are_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a.txt", ".git/b.txt", "sub/.venv/lib/c.txt", "sub/.venv/d.txt", ".e.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("words")
    root = f"{tmp_path}/texts"
    for source in (root, f"{root}/**"):
        listing = list_corpus(source)
        assert [file.uri for file in listing.files] == [f"{root}/.e.txt", f"{root}/a.txt"]
        assert sorted(listing.skipped) == [f"{root}/.git/", f"{root}/sub/.venv/"]
    assert said_skipped(listing) == f"2 hidden folders, such as {f'{root}/.git/'!r}"
    assert len(list_corpus(f"{root}/.git").files) == 1, "it is named"
    assert len(list_corpus(f"{root}/*/.venv/*.txt").files) == 1, "the pattern asks for it"


def test_what_holds_no_bytes_is_named_though_it_is_called_like_a_text(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_text("words")
    (root / "b.md").write_text("words")
    os.mkfifo(root / "pipe.txt")
    (root / "device.jsonl").symlink_to("/dev/null")
    (root / "gone.csv").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        # An absolute path may be too long for a socket
        listening.bind(os.path.relpath(root / "socket.parquet"))
        for source in (str(root), f"{root}/*", f"{root}/**"):
            listing = list_corpus(source, text_endings=[".md"])
            assert [file.uri for file in listing.files] == [f"{root}/a.txt", f"{root}/b.md"]
            names = ["device.jsonl", "gone.csv", "pipe.txt", "socket.parquet"]
            assert listing.skipped == listing.special == [f"{root}/{name}" for name in names]
            assert said_skipped(listing).startswith(
                f"4 special files, such as '{root}/device.jsonl' (pipes, sockets"
            )
    assert list_corpus(f"{root}/*.txt").skipped == [f"{root}/pipe.txt"]
    with pytest.raises(
        CorpusError, match=r"none of 0 files .* Skipped: 1 special file, such as '.*/pipe\.txt'"
    ):
        list_corpus(f"{root}/p*.txt")


def test_further_endings_are_read_as_text_where_they_are_named(tmp_path: Path) -> None:
    names = ("a.MD", "b.md.gz", "c.rst", "d.txt", "e.jsonl", "f")
    for name in names:
        (tmp_path / name).write_bytes(b"words" * 10)
    listing = list_corpus(str(tmp_path), text_endings=[".md", ".rst"])
    read_as = {file.uri.rpartition("/")[2]: (file.kind, file.compression) for file in listing.files}
    assert read_as == {
        "a.MD": ("txt", ""),
        "b.md.gz": ("txt", ".gz"),
        "c.rst": ("txt", ""),
        "d.txt": ("txt", ""),
        "e.jsonl": ("jsonl", ""),
    }
    assert listing.skipped == [f"{tmp_path}/f"]
    usual = list_corpus(str(tmp_path))
    assert [file.uri.rpartition("/")[2] for file in usual.files] == ["d.txt", "e.jsonl"]
    assert usual.skipped_bytes == {".MD": 50, ".md.gz": 50, ".rst": 50, "none": 50}


@pytest.mark.parametrize("ending", ["md", ".txt", ".csv.gz", "*.md", "."])
def test_an_ending_that_names_nothing_new_is_refused(ending: str) -> None:
    with pytest.raises(ValueError, match="text_endings"):
        DataConfig(text_endings=[ending])


def test_a_warning_says_when_most_bytes_are_skipped(tmp_path: Path) -> None:
    for name, num_bytes in {"a.txt": 100, "b.md.gz": 60, "c.rst": 30, "d": 5, "e.zst": 5}.items():
        (tmp_path / name).write_bytes(b"x" * num_bytes)
    assert most_is_skipped(list_corpus(str(tmp_path))) == ""
    (tmp_path / "e.rst").write_bytes(b"x" * 1000)
    said = most_is_skipped(list_corpus(str(tmp_path)))
    assert "1,100 of 1,200 bytes lie in files of unknown ending" in said
    assert "`--data.text-endings .rst .md`" in said
    assert most_is_skipped(list_corpus(str(tmp_path), text_endings=[".rst", ".md"])) == ""


def test_replaced_bytes_of_a_conversation_are_counted(tmp_path: Path) -> None:
    turns = (
        b'{"messages": [{"role": "user", "content": "a%s"}, {"role": "assistant", "content": "b"}]}'
    )
    path = write_lines(
        tmp_path / "a.jsonl", [turns % content for content in (b"", b"\xff", b"\\ud800")]
    )
    assert [document.replaced for document in read(path, format="chat")] == [False, True, True]


def test_blank_lines_hold_no_document(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b"", {"text": "one"}, b"   ", {"text": "two"}, b""])
    assert kept(path) == ["one", "two"]
    assert drops(path) == [None, None]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert kept(tmp_path / "a.txt") == kept(tmp_path / "a.jsonl") == ["hello"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\nhello\r\n")
    assert kept(tmp_path / "a.csv") == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "replaced", "position"),
    [
        ("a.txt", b"caf\xe9 noir", "caf\ufffd noir", 3),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', "caf\ufffd", 29),
        ("b.jsonl", b'{"text": "one"}\n{"text": "caf\\ud800"}\n', "caf\ufffd\ufffd\ufffd", 19),
    ],
)
def test_policies_for_invalid_utf8(
    tmp_path: Path, name: str, content: bytes, replaced: str, position: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    documents = read(path, invalid_utf8="replace")
    assert documents[-1].text == replaced
    assert [document.replaced for document in documents] == [False] * (len(documents) - 1) + [True]
    assert drops(path, invalid_utf8="skip")[-1] == Drop.INVALID_UTF8
    with pytest.raises(
        CorpusError, match=f"{name} is not UTF-8 at byte {position}; convert the file"
    ):
        read(path, invalid_utf8="fail")


@pytest.mark.parametrize("ending", [".txt.gz", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": TEXTS * 100}), path)
    else:
        content = b"".join(
            json.dumps({"text": f"{text} {n}"}).encode() + b"\n"
            for n in range(500)
            for text in TEXTS
        )
        path.write_bytes(PACKERS[path.suffix](content))
    assert kept(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        CorpusError, match=f"corpus{ending} cannot be read to its end .*; replace the file"
    ):
        read(path)


def test_listing_is_in_canonical_order_and_names_what_it_skips(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for name in ("z/1.txt", "z/2.JSONL.GZ", "a/b.parquet", "a/readme.md", "a/c.pdf"):
        storage.write_bytes(name, b"x")
    listing = list_corpus([f"{tmp_path}/z", f"{tmp_path}/a", f"{tmp_path}/**/1.txt"])
    names = [Path(entry.uri).relative_to(tmp_path).as_posix() for entry in listing.files]
    assert names == ["z/1.txt", "z/2.JSONL.GZ", "a/b.parquet"]
    assert listing.skipped == [f"{tmp_path}/a/c.pdf", f"{tmp_path}/a/readme.md"]
    with pytest.raises(
        CorpusError, match=r"c\.pdf has an unknown ending; expected \.txt \.jsonl \.csv \.parquet"
    ):
        list_corpus(f"{tmp_path}/a/c.pdf")
    with pytest.raises(CorpusError, match=r"none of 1 file at .* has a known ending"):
        list_corpus(f"{tmp_path}/a/*.pdf")
    with pytest.raises(NotFoundError, match="nothing is at"):
        list_corpus(f"{tmp_path}/nowhere/*.txt")
    with pytest.raises(CorpusError, match=r"data\.source is empty"):
        list_corpus([])


def test_s3_documents_are_the_local_ones(tmp_path: Path, s3_bucket: str) -> None:
    lines = [{"text": text} for text in TEXTS]
    write_lines(tmp_path / "a.jsonl", lines)  # type: ignore[arg-type]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    open_storage(f"s3://{s3_bucket}").upload_folder(tmp_path, "corpus")
    remote = list_corpus(f"s3://{s3_bucket}/corpus")
    assert [file.uri.rpartition("/")[2] for file in remote.files] == [
        "a.jsonl",
        "a.jsonl.zst",
        "a.parquet",
    ]
    for file in remote.files:
        assert read(file.uri) == read(tmp_path / file.uri.rpartition("/")[2])
    with pytest.raises(StorageError, match=r"none.jsonl.gz"):
        list_corpus(f"s3://{s3_bucket}/corpus/none.jsonl.gz")


def test_an_object_in_a_folder_without_a_name_is_refused(s3_server: str, s3_bucket: str) -> None:
    """Its key, cut at slashes and joined again, is another one's."""
    client = boto3.client("s3", endpoint_url=s3_server)
    client.put_object(Bucket=s3_bucket, Key="texts/a//b.txt", Body=b"text")
    with pytest.raises(
        CorpusError, match=r"texts/a//b\.txt is in a folder without a name.*; rename it"
    ):
        list_corpus(f"s3://{s3_bucket}/texts")


def test_a_file_that_changed_after_its_listing_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    listed = whole_file(list_corpus(str(path)).files[0])
    write_lines(path, [{"text": "two"}])
    with pytest.raises(ConflictError, match=r"a\.jsonl was changed after it was listed; run again"):
        list(read_documents(listed, DataConfig()))


def test_an_archive_that_changed_after_its_listing_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one"))
    chunk = Chunk(0, 0, [whole_file(list_corpus(str(path)).files[0])])
    path.write_bytes(gzip.compress(b"two"))
    with pytest.raises(
        ConflictError, match=r"a\.txt\.gz was changed after it was listed; run again"
    ):
        cut_file(chunk, store=open_storage(f"{tmp_path}/store"), data=DataConfig())


def test_csv_records_with_quotes_line_ends_and_missing_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [
        "id,text",
        "1,plain",
        '2,"with, comma"',
        '3,"two\nlines and ""quotes"""',
        "4",
        '5,""',
        "",
        '6,"last"',
    ]
    path.write_text("\r\n".join(rows), newline="")
    assert kept(path) == ["plain", "with, comma", 'two\nlines and "quotes"', "last"]
    assert [drop for drop in drops(path) if drop] == [Drop.MISSING_TEXT, Drop.EMPTY]
    with pytest.raises(
        CorpusError, match=r"no column 'body'; set data\.text_field to one of id, text"
    ):
        read(path, text_field="body")


def test_a_csv_header_that_is_not_utf8_costs_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for line_end in (b"\n", b"\r"):
        path.write_bytes(line_end.join([b"text,cat\xe9gorie", b"hello,1", b"caf\xe9,2", b""]))
        assert kept(path, invalid_utf8="replace") == ["hello", "caf\ufffd"]
        assert drops(path, invalid_utf8="skip") == [None, Drop.INVALID_UTF8]
    with pytest.raises(
        CorpusError, match="no column 'body'; set data\\.text_field to one of text, cat\ufffdgorie"
    ):
        read(path, invalid_utf8="skip", text_field="body")


def test_a_stray_quote_costs_its_line_only(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\none\n"never closed\n' + "".join(f"line {n}\n" for n in range(200_000)))
    documents = read(path, max_document_bytes=1000)
    assert [document.drop for document in documents if document.drop] == [Drop.INVALID_CSV]
    assert [document.text for document in documents if not document.drop][:3] == [
        "one",
        "line 0",
        "line 1",
    ]
    assert len(documents) == 200_002


def test_a_row_that_is_no_csv_is_counted_and_costs_no_other(tmp_path: Path) -> None:
    """Python's reader would accept each of them, and join two rows or cut one."""
    path = tmp_path / "a.csv"
    rows = [
        "id,text",
        '1,"never closed',
        '2,"quoted, and whole"',
        "3,two,more",
        "4,one,",
        '5,"5" tall"',
        '6,"x" ',
        "7,last",
    ]
    path.write_text("\n".join(rows), newline="")
    documents = read(path)
    assert [document.text for document in documents if not document.drop] == [
        "quoted, and whole",
        "one",
        "x ",
        "last",
    ]
    dropped = {document.preview: document.drop for document in documents if document.drop}
    assert dropped == dict.fromkeys([rows[1], rows[3], rows[5]], Drop.INVALID_CSV)
    path.write_text("\r".join(rows), newline="")
    assert [document._replace(offset=0) for document in read(path)] == [
        document._replace(offset=0) for document in documents
    ]


def test_a_record_that_crosses_the_limit_by_its_last_line_is_one_that_is_too_long(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text,id\n"good, one",1\n"{"a" * 700_000}\n{"b" * 700_000}",2\nlast,3\n')
    documents = read(path, max_document_bytes=100_000)
    assert [(document.drop, document.text) for document in documents] == [
        (None, "good, one"),
        (Drop.TOO_LONG, ""),
        (None, "last"),
    ]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path, ending: str) -> None:
    text = "".join(f"line {number} of a long text ÄÖÜ\n" for number in range(5000))
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKERS[ending](text.encode()))
    documents = read(path, max_document_bytes=4000)
    assert "".join(document.text for document in documents) == text
    assert max(document.size for document in documents) <= 4000
    assert all(document.text.endswith("\n") for document in documents)
    if not ending:
        assert read_in_chunks(path, shard_bytes=1000, max_document_bytes=4000) == documents


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("語" * 10_000)
    documents = read(path, max_document_bytes=1000)
    assert "".join(document.text for document in documents) == "語" * 10_000
    assert not any(document.replaced for document in documents)
    assert read_in_chunks(path, shard_bytes=1000, max_document_bytes=1000) == documents


def test_a_bomb_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(bytes(100 << 20)))
    with pytest.raises(
        CorpusError,
        match=r"a\.txt\.gz unpacks to more than 67108864 bytes; .*max_compression_ratio",
    ):
        read(path, max_document_bytes=200 << 20)


def test_a_listed_object_is_read_by_one_request(
    tmp_path: Path, s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    requests: list[str] = []
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        open_storage(f"s3://{s3_bucket}").upload_folder(tmp_path, "corpus")
        files = list_corpus(f"s3://{s3_bucket}/corpus").files
        proxy.spoil = lambda method, path: requests.append(f"{method} {path}")
        documents = [
            document
            for file in files
            for document in read_documents(whole_file(file), DataConfig())
        ]
    assert [document.text for document in documents] == [f"text {number}" for number in range(5)]
    assert [request.rpartition("/")[2] for request in requests] == [
        f"{number}.txt" for number in range(5)
    ]
