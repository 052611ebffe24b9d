"""Corpora of very many small files: listed and sampled within bounds, refused above a number, and
packed into few files."""

import gzip
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.settings.data import DataConfig
from cluster.storage.uris import NotFoundError, open_storage
from jobs.corpus import listing, pack_texts
from jobs.corpus.chunks import Chunk, plan_chunks, whole_file
from jobs.corpus.documents import read_documents
from jobs.corpus.listing import CorpusError, CorpusFile, list_corpus
from jobs.corpus.pack_texts import pack
from jobs.corpus.sample_places import sample_places
from jobs.tokens.build_store import tokenize
from tests.jobs.corpora import data_config, texts_of
from tests.time_limits import limit_s

NUM_FILES = 1_000_000

# In a process of its own, whose peak memory is that of this work alone.
PLAN = """
import pickle, resource, sys, time
from cluster.settings.data import DataConfig
from jobs.corpus.chunks import plan_chunks
from jobs.corpus.listing import CorpusFile, Listing
from jobs.corpus.sample_places import sample_places
from jobs.tokens.token_store import canonical_json
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = [CorpusFile(n, f"/corpus/{n % 997:03d}/{n:07d}.txt", 0, 900 + n % 500, str(10**18 + n), "txt") for n in range(int(sys.argv[1]))]
listing = Listing(files, {}, [], {}, ["/corpus"])
data = DataConfig(shard_bytes=16 << 20)
chunks = plan_chunks(files, {}, data)
travelling = [pickle.dumps(chunk) for chunk in chunks]  # as tasks get them
assert pickle.loads(travelling[-1]) == chunks[-1]
places = list(sample_places(files, data, share_bytes=256 << 20))
assert sum(wanted for wanted, _ in places) <= 256 << 20
written = canonical_json(listing.record())
print(len(chunks), len(places), len(written), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.more
def test_a_million_files_are_planned_and_sampled_in_bounded_memory_and_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(NUM_FILES)],
        capture_output=True,
        text=True,
        check=True,
        timeout=limit_s(200),
    )
    num_chunks, num_places, num_bytes, seconds, peak_kib = map(float, done.stdout.split())
    assert num_chunks == -(-NUM_FILES // 512)
    assert num_places == 1024
    assert num_bytes < 200 * NUM_FILES
    assert seconds < limit_s(60)
    assert peak_kib * 1024 < 2000 * NUM_FILES


def write_texts(folder: Path, num_files: int = 60) -> None:
    rng = random.Random(0)
    (folder / "b.d").mkdir(parents=True)
    (folder / "b").mkdir()
    for number in range(num_files):
        text = " ".join("".join(rng.choices("aeioustrnlm", k=5)) for _ in range(rng.randint(1, 80)))
        name = ("a-{0}.txt", "b/{0}.txt", "b.d/{0}.TXT", "b/x{0}.txt.gz")[number % 4].format(number)
        (folder / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        )
    (folder / "b" / "empty.txt").write_bytes(b"")
    (folder / "b" / "marked.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (folder / "b" / "latin.txt").write_bytes("Ein Stück".encode("latin-1"))
    (folder / "b" / "binary.txt").write_bytes(b"\x00\x01")
    (folder / "c-long.txt").write_text(
        "\n".join(f"line {number} of a long text" for number in range(200))
    )
    (folder / "readme.md").write_text("not a corpus file")


def documents(source: str, data: DataConfig) -> list[tuple[str, object, bool]]:
    found = []
    for chunk in plan_chunks(
        list_corpus(source).files, {}, data.model_copy(update={"shard_bytes": 4000})
    ):
        for part in chunk.parts:
            found += [(each.text, each.drop, each.replaced) for each in read_documents(part, data)]
    return found


@pytest.mark.parametrize("place", ["local", "s3"])
def test_packed_texts_are_the_same_documents_in_the_same_order(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_texts, "_FILE_BYTES", 5000)
    monkeypatch.setattr(pack_texts, "_BATCH_BYTES", 1500)
    write_texts(tmp_path / "texts")
    source, root = f"{tmp_path}/texts", f"{tmp_path}/packed"
    if place == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        open_storage(f"s3://{bucket}").upload_folder(tmp_path / "texts", "texts")
        source, root = f"s3://{bucket}/texts", f"s3://{bucket}/packed"
    data = DataConfig(max_document_bytes=1000)
    result = pack(source, root, data)
    keys = [entry.key for entry in open_storage(root).entries()]
    assert result["packed_files"] == len(keys) > 3
    assert keys == [f"part-{number:05d}.parquet" for number in range(len(keys))]
    assert result["files"] == 65
    expected = documents(source, data)
    assert documents(root, data) == expected
    assert result["documents"] == len(expected) > 65  # the long one is several
    assert {str(drop) for _, drop, _ in expected} == {"None", "empty", "binary"}
    assert any(replaced for _, _, replaced in expected)


def test_a_source_that_cannot_be_packed_leaves_the_destination_as_it_is(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("not a corpus file")
    refused = {
        "textz": (NotFoundError, "nothing is at .*textz"),
        "notes": (CorpusError, r"notes has no \.txt files"),
    }
    for name, (kind, words) in refused.items():
        with pytest.raises(kind, match=words):
            pack(f"{tmp_path}/{name}", f"{tmp_path}/packed", DataConfig())
    with pytest.raises(
        CorpusError, match=r"texts/packed is in .*texts, .*; name a folder elsewhere"
    ):
        pack(f"{tmp_path}/texts", f"{tmp_path}/texts/packed", DataConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "notes"}
    assert not (tmp_path / "texts" / "packed").exists()
    assert pack(f"{tmp_path}/texts", f"{tmp_path}/packed", DataConfig())["files"] == 65


def test_the_command_packs_for_the_stage(
    ray_workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "texts")
    assert main(["data", "pack", f"{tmp_path}/texts", f"{tmp_path}/packed", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["files"], result["packed_files"]) == (65, 1)
    rows = pq.read_table(tmp_path / "packed" / "part-00000.parquet")["text"].to_pylist()
    assert b"with a mark" in rows
    assert b"Ein St\xfcck" in rows
    plain = tokenize(data_config(f"{tmp_path}/texts", tmp_path / "plain"))
    packed = tokenize(data_config(f"{tmp_path}/packed", tmp_path / "storage"))
    assert texts_of(packed) == texts_of(plain)
    for name in ("documents", "tokens", "bytes", "dropped"):
        assert packed[name] == plain[name]
    assert main(["data", "pack", f"{tmp_path}/texts", f"{tmp_path}/packed"]) == 1
    assert "packed is not empty; name a new folder" in capfd.readouterr().err
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "a"}')
    assert main(["data", "pack", f"{tmp_path}/texts", f"{tmp_path}/half"]) == 1
    assert "a.jsonl is no .txt file" in capfd.readouterr().err
    # What is there is not all
    assert main(["data", "preview", "--data.source", f"{tmp_path}/half"]) == 1
    assert (
        "half/PACKING-IS-NOT-FINISHED.parquet cannot be read to its end" in capfd.readouterr().err
    )


@pytest.mark.parametrize("place", ["local", "s3"])
def test_too_many_files_are_refused_with_the_way_out_before_all_are_listed(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_FILES", 20)
    write_texts(tmp_path / "texts", num_files=10)
    source = f"{tmp_path}/texts"
    if place == "s3":
        source = f"s3://{request.getfixturevalue('s3_bucket')}/texts"
        open_storage(source).upload_folder(tmp_path / "texts", "")
    assert len(list_corpus(source).files) == 15
    (tmp_path / "more").mkdir()
    for number in range(10):
        open_storage(source).write_bytes(f"more/{number}.txt", b"text")
    with pytest.raises(
        CorpusError, match=r"has more than 20 files; `raymill data pack .*/texts DEST` writes \.txt"
    ):
        list_corpus(source)
    # Each once
    assert len(list_corpus([f"{source}/b", f"{source}/**/*.gz", f"{source}/b/*"]).files) < 15


def test_chunks_travel_whole(tmp_path: Path) -> None:
    files = [CorpusFile(n, f"/a/\udcff{n}.txt.gz", n, n * 7, "v", "txt", ".gz") for n in range(3)]
    chunk = Chunk(5, 1, [whole_file(file) for file in files])
    assert pickle.loads(pickle.dumps(chunk)) == chunk
    assert [wanted for wanted, _ in sample_places(files[:1], DataConfig(), share_bytes=10)] == [10]
