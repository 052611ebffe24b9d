"""hf:// corpora and models, against a stub of the Hub: pinned to a commit, read by ranges, and
errors that say what to do."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from cluster.storage.hub import HubStorage
from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import (
    NotFoundError,
    StorageError,
    absolute_uri,
    glob_uris,
    open_storage,
    pinned,
    split_uri,
)
from tests.cluster.hub_stub import HubStub, running_hub

ROOT = "hf://datasets/owner/texts"
LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(1000))


def table() -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": [f"row {number}" for number in range(5000)]}), sink, row_group_size=1000
    )
    return sink.getvalue()


FILES = {
    "README.md": b"a card",
    "data/a.jsonl": LINES,
    "data/odd name#1.jsonl": b"{}",
    "data/en/b.jsonl": b"b",
    "data/en/old/c.jsonl": b"c",
    "data/rows.parquet": table(),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with running_hub() as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        stub.commit(FILES)
        yield stub


def test_files_folders_and_patterns(hub: HubStub) -> None:
    location, commit = pinned(ROOT)
    assert (location, commit) == (f"{ROOT}@{hub.branches['main']}", hub.branches["main"])

    def names(pattern: str) -> list[str]:
        return [
            entry.key.removeprefix(f"{location}/") for entry in glob_uris(f"{location}/{pattern}")
        ]

    assert names("") == names("**") == sorted(FILES)
    assert names("data") == names("data/") == sorted(FILES)[1:]
    assert names("data/*.jsonl") == ["data/a.jsonl", "data/odd name#1.jsonl"]
    assert names("data/**/*.jsonl") == [name for name in sorted(FILES) if name.endswith(".jsonl")]
    assert names("*/en/?.jsonl") == ["data/en/b.jsonl"]
    assert names("**/[bc].jsonl") == ["data/en/b.jsonl", "data/en/old/c.jsonl"]
    assert names("data/odd name#1.jsonl") == ["data/odd name#1.jsonl"]
    with pytest.raises(NotFoundError, match=r"nothing is at '.*/data/\*\.csv'"):
        glob_uris(f"{location}/data/*.csv")


def test_a_listing_and_the_file_itself_tell_the_same_version(hub: HubStub) -> None:
    entries = open_storage(ROOT).list()
    assert {entry.key: entry.size for entry in entries} == {
        name: len(data) for name, data in FILES.items()
    }
    assert [open_storage(ROOT).stat(entry.key) for entry in entries] == entries
    assert len({entry.version for entry in entries}) == len(FILES)
    assert open_storage(ROOT).stat("data") is None
    assert not open_storage(ROOT).exists("data/none.jsonl")


def test_a_moved_branch_is_not_seen_after_pinning(hub: HubStub) -> None:
    location, commit = pinned(f"{ROOT}/data/*.jsonl")
    before = list(glob_uris(location))
    with open_storage(ROOT).open("data/a.jsonl") as unpinned_but_open:
        hub.commit({"data/a.jsonl": b"new" * 10_000, "data/new.jsonl": b"{}"})
        assert unpinned_but_open.read() == LINES
    assert list(glob_uris(location)) == before
    storage, name = split_uri(before[0].key)
    assert storage.read_bytes(name) == LINES
    assert pinned(location) == (location, commit)
    assert len(list(glob_uris(f"{ROOT}/data/*.jsonl"))) == 2
    moved, newer = pinned(f"{ROOT}@main/data/*.jsonl")
    assert newer != commit
    assert [entry.size for entry in glob_uris(moved)] == [30_000, 2]


def test_ranges_are_read_and_small_reads_share_a_request(hub: HubStub) -> None:
    data = bytes(range(256)) * (80 << 10)  # 20 MiB
    hub.commit({"big.bin": data, "rows.parquet": FILES["data/rows.parquet"]})
    storage = open_storage(pinned(ROOT)[0])
    assert storage.read_bytes("big.bin", start=100, end=1000) == data[100:1000]
    assert storage.read_bytes("big.bin", start=len(data) - 7) == data[-7:]
    assert storage.read_bytes("big.bin", start=9, end=9) == b""
    hub.asked.clear()
    with storage.open("big.bin") as file:
        assert b"".join(iter(lambda: file.read(100_000), b"")) == data
        file.seek(-20, 2)
        assert file.read() == data[-20:]
    assert [asked for method, _, asked, _ in hub.asked if method == "GET"][:2] == [
        "bytes=0-8388607",
        "bytes=8388608-16777215",
    ]
    assert len(hub.asked) == 5  # what the file is, three blocks, and the tail
    with storage.open("big.bin") as file:
        assert file.read(3) == data[:3]
    assert len(hub.asked) == 6  # what a commit's file is, is known
    with storage.open("rows.parquet") as file:  # redirected to large-file storage
        assert pq.ParquetFile(file).read_row_group(4)["text"][999].as_py() == "row 4999"


@pytest.mark.parametrize("fault", [503, "short"])
def test_a_failed_or_short_answer_is_asked_again(hub: HubStub, fault: int | str) -> None:
    hub.faults = [fault]
    with open_storage(ROOT).open("data/a.jsonl") as file:
        assert file.read() == LINES
    assert [method for method, *_ in hub.asked].count("GET") == 2


def test_uris_and_pickling(hub: HubStub, tmp_path: Path) -> None:
    assert absolute_uri(f"{ROOT}/data/") == f"{ROOT}@main/data"
    assert absolute_uri(f"{ROOT}@refs/convert/parquet/x") == f"{ROOT}@refs%2Fconvert%2Fparquet/x"
    folder, name = split_uri(f"{ROOT}@v%2F1/data/a.jsonl")
    assert (folder, name) == (HubStorage("owner/texts", "v/1", "data"), "a.jsonl")
    assert split_uri(ROOT) == (HubStorage("owner/texts"), "")
    hub.commit({"data/x.txt": b"on a branch with a slash"}, branch="v/1")
    [entry] = glob_uris(f"{ROOT}@v%2F1/**/*.txt")
    assert entry.key == f"{ROOT}@v%2F1/data/x.txt"
    assert pinned(f"{ROOT}@v%2F1/**")[1] == hub.branches["v/1"]
    storage = pickle.loads(pickle.dumps(open_storage(f"{ROOT}@v%2F1"))).child("data")
    storage.download_file("x.txt", tmp_path / "x.txt")
    assert (
        (tmp_path / "x.txt").read_bytes()
        == b"on a branch with a slash"
        == storage.read_bytes("x.txt")
    )
    assert pinned("s3://bucket/x") == ("s3://bucket/x", "")
    assert pinned("some/folder") == ("some/folder", "")


def test_a_model_is_fetched_once_for_each_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 1000,
        "card.md": b"a card",
        "onnx/config.json": b"",
    }
    with running_hub("model") as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.url)
        first = stub.commit(files)
        assert absolute_uri("hf://owner/texts/onnx") == "hf://owner/texts@main/onnx"
        uri, folder = find_checkpoint("hf://owner/texts@main", str(tmp_path))
        assert uri == f"hf://owner/texts@{first}"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict(
            list(files.items())[:2]
        )
        stub.asked.clear()
        assert find_checkpoint(uri, str(tmp_path)) == (uri, folder)
        assert not [path for method, path, *_ in stub.asked if "/resolve/" in path]
        second = stub.commit(files | {"model.safetensors": b"others"})
        newer, other = find_checkpoint("hf://owner/texts", str(tmp_path))
        assert (newer, (other / "model.safetensors").read_bytes()) == (
            f"hf://owner/texts@{second}",
            b"others",
        )
        assert find_checkpoint(uri, str(tmp_path)) == (uri, folder)
        with pytest.raises(
            NotFoundError, match=r"datasets/owner/texts@main: no such repository .* is a model"
        ):
            pinned(ROOT)


def test_it_is_read_only(hub: HubStub) -> None:
    storage = open_storage(ROOT)
    for action in (
        lambda: storage.write_bytes("x", b""),
        lambda: storage.delete("data/a.jsonl"),
        lambda: storage.upload_file(Path(__file__), "x"),
        lambda: storage.upload_folder(Path(__file__).parent, "x"),
    ):
        with pytest.raises(
            StorageError, match=r"@main.* can only be read; write to a folder or to s3://"
        ):
            action()
    assert storage.local_path("data/a.jsonl") is None
    assert hub.asked == []


def test_the_token_comes_from_the_environment_alone(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hf_of_a_login_file")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    glob_uris(f"{ROOT}/**/a.jsonl")
    open_storage(ROOT).read_bytes("README.md")
    assert {token for *_, token in hub.asked} == {None}
    hub.asked.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    glob_uris(f"{ROOT}/**/a.jsonl")
    pinned(ROOT)
    open_storage(ROOT).read_bytes("README.md")
    assert {token for *_, token in hub.asked} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (
            "hf://datasets/owner/nothing",
            r"@main(/x)?: no such repository at http://127\.0\.0\.1:\d+, or HF_TOKEN may not see",
        ),
        (f"{ROOT}@v9/data", r"@v9/data(/x)?: no such revision; name a branch, a tag or a commit"),
    ],
)
def test_missing_dataset_and_revision_are_one_line(hub: HubStub, uri: str, text: str) -> None:
    for action in (pinned, glob_uris, lambda uri: open_storage(uri).open("x")):
        with pytest.raises(NotFoundError, match=text) as caught:
            action(uri)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        NotFoundError, match=r"data/none\.jsonl: there is no such file; check the URI"
    ):
        open_storage(ROOT).open("data/none.jsonl")


def test_denied_gated_offline_and_out_of_reach(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for status, text in (
        (401, r"access denied \(401\); check HF_TOKEN"),
        (403, r"access denied \(403\); check HF_TOKEN"),
        (416, "the Hub answered 416"),
    ):
        hub.faults = [status]
        with pytest.raises(StorageError, match=text) as caught:
            open_storage(ROOT).read_bytes("README.md")
        assert "\n" not in str(caught.value)
        assert "hf_secret" not in str(caught.value)
    hub.gated = True
    with pytest.raises(StorageError, match="the repository is gated; accept its terms"):
        pinned(ROOT)
    monkeypatch.setenv("HF_ENDPOINT", "http://user:sesame@127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"127\.0\.0\.1:9 cannot be reached \(ConnectError\); check"
    ) as caught:
        pinned(ROOT)
    assert "sesame" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set; unset it"):
        pinned(ROOT)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://datasets/owner",
        "hf://spaces/owner/texts",
        "hf://datasets/owner/texts@/x",
        "hf://",
        f"{ROOT}//a",
    ],
)
def test_another_form_is_refused(uri: str) -> None:
    with pytest.raises(
        StorageError, match="expected hf://owner/name@revision/path for a model, or hf://datasets"
    ):
        open_storage(uri)
    with pytest.raises(StorageError, match="leaves its folder"):
        open_storage(f"{ROOT}/a/../../b")
