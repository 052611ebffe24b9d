"""Hostile files, read without a cluster: an unreadable file stops the job by name; memory stays
small."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.cli import main
from cluster.settings.data import DataConfig
from cluster.storage.uris import open_storage
from jobs.corpus.chunks import plan_chunks, whole_file
from jobs.corpus.documents import read_documents
from jobs.corpus.listing import CorpusError, list_corpus
from jobs.tokens.preview_data import preview
from tests.cluster.fault_proxy import Cut, FaultProxy, Refused, running_proxy
from tests.jobs.corpora import data_config
from tests.jobs.hostile_corpus import make_hostile_corpus
from tests.repository import REPOSITORY
from tests.time_limits import limit_s


def damaged_parquet(**columns: Any) -> bytes:
    return parquet_of(pa.table(columns))


def parquet_of(table: pa.Table, **settings: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **settings)
    return sink.getvalue().to_pybytes()


def flipped(content: bytes, found: bytes, replacement: bytes) -> bytes:
    assert found in content
    return content.replace(found, replacement)


LINES = b"".join(json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(2000))
TABLE = damaged_parquet(text=[f"row {n}" for n in range(100)])
CHECKED = parquet_of(
    pa.table({"text": [f"row {n}" for n in range(100)]}),
    write_page_checksum=True,
    use_dictionary=False,
    compression="none",
)
BROKEN = "cannot be read to its end"
STOPS: dict[str, tuple[bytes, str]] = {
    "truncated.jsonl.gz": (gzip.compress(LINES)[:-9], BROKEN),
    "truncated.jsonl.zst": (zstandard.compress(LINES)[:-9], BROKEN),
    "second-member-truncated.jsonl.gz": (gzip.compress(LINES) + gzip.compress(LINES)[:-1], BROKEN),
    "no-gzip.txt.gz": (b"plain text", BROKEN),
    "no-zstd.txt.zst": (b"plain text", BROKEN),
    "bomb.txt.gz": (
        gzip.compress(bytes(65 << 20)),
        "unpacks to more than 67108864 bytes; take it out",
    ),
    "bomb.jsonl.zst": (
        zstandard.compress(bytes(65 << 20)),
        "unpacks to more than 67108864 bytes; take it out",
    ),
    "truncated.parquet": (TABLE[:-9], BROKEN),
    "empty.parquet": (b"", BROKEN),
    "text.parquet": (b"no table at all", BROKEN),
    "name.parquet": (flipped(TABLE, b"text", b"t\xe7xt"), BROKEN),
    "altered.parquet": (
        flipped(CHECKED, b"row 50", b"row 5O"),
        rf"{BROKEN} \(.*checksum verification failed.*\); replace the file",
    ),
    "two-columns.parquet": (
        parquet_of(pa.table([["x"], ["y"], [1]], names=["text", "text", "id"])),
        r"has 2 columns 'text', expected one; rename the others .* set data\.text_field",
    ),
    "two-columns.csv": (
        b"id,text,text\n1,x,y\n",
        r"has 2 columns 'text', expected one; rename the others .* set data\.text_field",
    ),
    "no-column.parquet": (
        damaged_parquet(body=["x"]),
        r"has no column 'text'; set data\.text_field to one of body",
    ),
    "number.parquet": (damaged_parquet(text=[1]), "'text' of .* holds int64, not strings"),
    "list.parquet": (
        damaged_parquet(text=[["x"]]),
        "'text' of .* holds list<element: string>, not strings",
    ),
    "extension.parquet": (
        damaged_parquet(text=pa.array([b"0" * 16], pa.uuid())),
        "'text' of .* holds extension<arrow.uuid>, not strings",
    ),
    "no-column.csv": (
        b"id,body\n1,x\n",
        r"has no column 'text'; set data\.text_field to one of id, body",
    ),
    "open-header.csv": (b'id,"text\n1,x\n', "the header of .* does not end: a quote is not closed"),
    "utf-16.csv": (
        "id,text\n1,x\n".encode("utf-16"),
        "is binary or UTF-16, not text in UTF-8; convert it",
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_file_that_nobody_could_judge_stops_the_job_by_name(name: str, tmp_path: Path) -> None:
    content, expected = STOPS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("a good text")
    with pytest.raises(CorpusError, match=expected) as caught:
        preview(data_config(str(tmp_path), "unused"))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / name).unlink()
    assert preview(data_config(str(tmp_path), "unused"))["documents"] == 1


def test_pages_of_parquet_are_read_with_right_checksums_and_without_any(tmp_path: Path) -> None:
    for name, content in (("with", CHECKED), ("without", TABLE)):
        (tmp_path / f"{name}.parquet").write_bytes(content)
        found = preview(data_config(str(tmp_path / f"{name}.parquet"), "unused"))
        assert (found["documents"], found["dropped"]) == (100, {})


def test_no_pickle_of_a_parquet_file_is_loaded(tmp_path: Path) -> None:
    payload = f"cos\nsystem\n(S'touch {tmp_path}/loaded'\ntR.".encode()
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    pq.write_table(pa.table({"text": ["a text"]}, schema=schema), tmp_path / "a.parquet")
    assert preview(data_config(str(tmp_path), "unused"))["examples"][0]["text"] == "a text"
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("name", ["empty-groups", "plain", "dictionary"])
@pytest.mark.parametrize("shard_bytes", [211, 900])
def test_byte_ranges_together_give_each_row_once(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    make_hostile_corpus(tmp_path / "texts")
    files = list_corpus(f"{tmp_path}/texts/{name}.parquet").files
    chunks = plan_chunks(files, {}, DataConfig(shard_bytes=shard_bytes))
    parts = [part for chunk in chunks for part in chunk.parts]
    rows = pq.read_table(files[0].uri, columns=["text"]).column("text").to_pylist()
    assert len(parts) > 1
    assert [
        document.text for part in parts for document in read_documents(part, DataConfig())
    ] == rows


def test_misuse_and_failure_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.parquet").write_bytes(TABLE[:-9])
    assert main(["data", "preview", "--data.source", str(tmp_path)]) == 1
    assert (
        f"error: {tmp_path}/a.parquet cannot be read to its end"
        in (streams := capfd.readouterr()).err
    )
    assert "Traceback" not in streams.err
    assert main(["tokenize", "--data.source", str(tmp_path), "--data.weights", "1", "2"]) == 2
    assert (
        "2 weights for 1 sources; give one a source, or none" in (streams := capfd.readouterr()).err
    )
    assert streams.err.startswith("error: ") and streams.err.count("\n") == 1


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def uploaded(bucket: str, name: str, folder: Path) -> str:
    """Returns the URI of 2 MB of documents in a bucket, which are also kept locally."""
    texts = [f"{text}, {number}" for number in range(20_000) for text in ("one text", "another")]
    if name.endswith(".parquet"):
        pq.write_table(
            pa.table({"text": texts}), folder / name, row_group_size=10_000, use_dictionary=False
        )
    else:
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        (folder / name).write_bytes(gzip.compress(lines, 1) if name.endswith(".gz") else lines)
    open_storage(f"s3://{bucket}").upload_file(folder / name, name)
    return f"s3://{bucket}/{name}"


def texts_at(uri: str) -> list[str]:
    return [
        document.text
        for document in read_documents(whole_file(list_corpus(uri).files[0]), DataConfig())
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_body_reset_midway_is_resumed(
    proxy: FaultProxy, s3_bucket: str, name: str, tmp_path: Path
) -> None:
    uri = uploaded(s3_bucket, name, tmp_path)
    proxy.script = [Cut(after=50_000, kind="reset"), Cut(after=10_000), None]
    assert texts_at(uri) == texts_at(str(tmp_path / name))
    assert not proxy.script


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_refused_object_is_one_line_and_exit_code_1(
    proxy: FaultProxy, s3_bucket: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = uploaded(s3_bucket, name, tmp_path)
    proxy.script = [Refused(403, "AccessDenied")]
    assert main(["data", "preview", "--data.source", uri]) == 1
    said, error = capsys.readouterr().err.splitlines()
    assert said == "data preview: reading a sample of the corpus"
    assert re.fullmatch(
        f"error: {uri}.*: access denied .AccessDenied.; check the credentials and .*", error
    )


READ = """
import resource, sys
from cluster.settings.data import DataConfig
from jobs.corpus.chunks import whole_file
from jobs.corpus.listing import list_corpus
from jobs.corpus.documents import read_documents

def peak_after(uri):
    file = list_corpus(uri).files[0]
    found = [(str(document.drop), document.size) for document in read_documents(whole_file(file), DATA)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(found), sum(size for _, size in found), found[0][0]

DATA = DataConfig(max_document_bytes=50_000)
before = peak_after(sys.argv[1])[0]
peak, count, size, first = peak_after(sys.argv[2])
print(peak - before, count, size, first)
"""

HUGE: dict[str, tuple[bytes, tuple[int, str]]] = {
    "line.txt": (b"x" * (30 << 20), (0, "None")),
    "lines.txt.gz": (gzip.compress(b"a line\n" * (4 << 20), 1), (0, "None")),
    "line.jsonl": (b'{"text": "' + b"x" * (30 << 20) + b'"}\n', (1, "too_long")),
    "field.csv": (b'text\n"' + b"x" * (30 << 20) + b'"\n', (1, "too_long")),
    "lines-in-quotes.csv": (
        b'text\n"' + b"some words here\n" * (1 << 17) + b'"\n',
        (0, "invalid_csv"),
    ),
}


@pytest.mark.more
@pytest.mark.parametrize("name", HUGE)
def test_a_huge_document_is_read_in_little_memory(name: str, tmp_path: Path) -> None:
    content, (count, first) = HUGE[name]
    (tmp_path / name).write_bytes(content)
    small = tmp_path / f"small{name[name.index('.') :]}"
    small.write_bytes(
        {".csv": b"text\nx\n", ".jsonl": b'{"text": "x"}\n', ".gz": gzip.compress(b"x")}.get(
            small.suffix, b"x"
        )
    )
    output = subprocess.run(
        [sys.executable, "-c", READ, small, tmp_path / name], env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=limit_s(60), check=True,
    ).stdout.split()  # fmt: skip
    assert output[3] == first
    assert int(output[1]) == count if count else int(output[1]) > 500
    if first == "None":
        assert int(output[2]) == (30 << 20 if name == "line.txt" else 28 << 20)  # nothing is lost
    assert int(output[0]) < 16_000, f"{output[0]} KiB more than for a small file"
