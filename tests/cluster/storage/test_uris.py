"""Storage: disk and S3 behave the same, writes are whole or absent, and errors say what to do."""

import json
import multiprocessing
import os
import pickle
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from cluster.storage.uris import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    Storage,
    StorageError,
    absolute_uri,
    glob_uris,
    open_storage,
    split_uri,
)
from tests.killed_upload import killed_upload
from tests.time_limits import limit_s


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty root, once on disk and once in S3."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix"


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


def test_bytes_come_back_whole_and_by_range(storage: Storage) -> None:
    data = bytes(range(256)) * 40
    storage.write_bytes("a/b.bin", data)
    assert storage.read_bytes("a/b.bin") == data
    assert storage.read_bytes("a/b.bin", start=100, end=300) == data[100:300]
    assert storage.read_bytes("a/b.bin", start=10_000) == data[10_000:]
    assert storage.read_bytes("a/b.bin", end=3) == data[:3]
    assert storage.read_bytes("a/b.bin", start=5, end=5) == b""
    assert storage.read_bytes("a/b.bin", start=5, end=4) == b""
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a/b.bin") == data


def test_listing_is_sorted_and_versions_follow_the_bytes(storage: Storage) -> None:
    assert storage.list() == []
    for key in ("b/2", "a", "b/10", "b-1"):
        storage.write_bytes(key, key.encode())
    assert [(entry.key, entry.size) for entry in storage.list()] == [
        ("a", 1),
        ("b-1", 3),
        ("b/10", 4),
        ("b/2", 3),
    ]
    assert [entry.key for entry in storage.list("b/")] == ["b/10", "b/2"]
    assert [entry.key for entry in storage.list("b")] == ["b-1", "b/10", "b/2"]
    assert [entry.key for entry in storage.child("b").list()] == ["10", "2"]
    before = storage.stat("a")
    storage.write_bytes("a", b"x")
    after = storage.stat("a")
    assert before and after and before.version != after.version
    assert storage.list()[0] == after


def test_exists_and_delete(storage: Storage) -> None:
    storage.write_bytes("folder/file", b"1")
    assert storage.exists("folder/file")
    assert not storage.exists("folder")
    assert not storage.exists("folder/fil")
    storage.delete("folder/file")
    storage.delete("folder/file")
    assert not storage.exists("folder/file")
    with pytest.raises(NotFoundError, match="folder/file does not exist"):
        storage.read_bytes("folder/file")
    with pytest.raises(NotFoundError, match="folder/file does not exist"):
        storage.open("folder/file")


def test_only_one_of_many_creates_a_file(storage: Storage) -> None:
    winners: list[int] = []

    def create(number: int) -> None:
        try:
            storage.write_bytes("lease", str(number).encode(), if_absent=True)
        except AlreadyExistsError:
            return
        winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert storage.read_bytes("lease") == str(winners[0]).encode()


def test_each_write_has_another_version_which_a_condition_may_ask_for(storage: Storage) -> None:
    versions = [storage.write_bytes("lease", b"%d" % number) for number in range(50)]
    assert len(set(versions)) == 50
    entry = storage.stat("lease")
    assert entry and entry.version == versions[-1]
    newer = storage.write_bytes("lease", b"mine", if_version=versions[-1])
    assert newer not in versions
    for outdated in (versions[0], versions[-1]):
        with pytest.raises(ConflictError, match="lease was changed or removed by another process"):
            storage.write_bytes("lease", b"theirs", if_version=outdated)
        with pytest.raises(ConflictError):
            storage.delete("lease", if_version=outdated)
    assert storage.read_bytes("lease") == b"mine"
    assert [entry.key for entry in storage.list()] == ["lease"]
    storage.delete("lease", if_version=newer)
    assert not storage.exists("lease")
    with pytest.raises(ConflictError):
        storage.write_bytes("lease", b"back", if_version=newer)
    assert not storage.exists("lease")


def _count(uri: str, times: int) -> None:
    storage = open_storage(uri)
    for _ in range(times):
        while True:
            before = storage.stat("counter")
            assert before is not None
            number = int(storage.read_bytes("counter"))
            try:
                storage.write_bytes("counter", b"%d" % (number + 1), if_version=before.version)
                break
            except ConflictError:
                continue


def test_processes_that_count_in_one_local_file_lose_no_count(tmp_path: Path) -> None:
    open_storage(str(tmp_path)).write_bytes("counter", b"0")
    context = multiprocessing.get_context("fork")  # a fresh interpreter does not find the tests
    processes = [context.Process(target=_count, args=(str(tmp_path), 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit_s(120))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert open_storage(str(tmp_path)).read_bytes("counter") == b"90"


def test_a_local_version_differs_where_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(str(tmp_path))
    monkeypatch.setattr(time, "time_ns", iter([5_000, 5_000, 4_000, 3_000]).__next__)
    versions = [storage.write_bytes("file", b"x") for _ in range(4)]
    assert versions == sorted(set(versions))


def test_reader_seeks(storage: Storage) -> None:
    storage.write_bytes("lines", b"".join(b"line %d\n" % number for number in range(1000)))
    with storage.open("lines") as file:
        assert len(file.read()) == 8890
        file.seek(0)
        assert file.readline() == b"line 0\n"
        file.seek(-9, 2)
        assert file.read() == b"line 999\n"
        assert file.seek(7) == 7
        assert file.readline() == b"line 1\n"


def test_folders_travel_whole_with_the_manifest_last(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    for name in ("manifest.json", "a.bin", "z.bin", "deep/file"):
        (source / name).write_text(name)
    order: list[str] = []
    upload_file = type(storage).upload_file

    def recorded(self: Storage, source: Path, key: str) -> None:
        order.append(key)
        upload_file(self, source, key)

    monkeypatch.setattr(type(storage), "upload_file", recorded)
    storage.upload_folder(source, "run/1", last="manifest.json")
    assert order == ["a.bin", "deep/file", "z.bin", "manifest.json"]
    storage.download_folder("run/1", target, last="manifest.json")
    copied = {
        path.relative_to(target).as_posix(): path.read_text()
        for path in target.rglob("*")
        if path.is_file()
    }
    assert copied == {name: name for name in ("manifest.json", "a.bin", "z.bin", "deep/file")}
    with pytest.raises(NotFoundError, match="is empty or does not exist"):
        storage.download_folder("run/2", target)


def test_patterns_folders_and_files_name_the_same_on_disk_and_s3(
    storage: Storage, root: str
) -> None:
    for key in (
        "data/a.txt",
        "data/b.jsonl",
        "data/sub/c.txt",
        "data/sub/deeper/d.txt",
        "data/[x].txt",
        "other.txt",
    ):
        storage.write_bytes(key, b"text")

    def names(pattern: str) -> list[str]:
        return [entry.key.removeprefix(f"{root}/") for entry in glob_uris(f"{root}/{pattern}")]

    everything = [
        "data/[x].txt",
        "data/a.txt",
        "data/b.jsonl",
        "data/sub/c.txt",
        "data/sub/deeper/d.txt",
    ]
    assert names("data") == names("data/") == names("data/**") == everything
    assert names("data/*.txt") == ["data/[x].txt", "data/a.txt"]
    assert names("data/**/*.txt") == [name for name in everything if name.endswith(".txt")]
    assert names("data/*/?.txt") == ["data/sub/c.txt"]
    assert names("data/[ab].*") == ["data/a.txt", "data/b.jsonl"]
    assert names("data/[!a].*") == ["data/b.jsonl"]
    # A file of that very name goes before the pattern
    assert names("data/[x].txt") == ["data/[x].txt"]
    assert names("data/a.txt") == ["data/a.txt"]
    assert names("**/c.txt") == ["data/sub/c.txt"]
    with pytest.raises(NotFoundError, match="nothing is at"):
        glob_uris(f"{root}/data/*.csv")


def test_odd_names_on_disk_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two\nlines").mkdir()
    for name in ("two\nlines/a.txt", "~t.txt"):
        (tmp_path / name).write_text("text")
    assert [entry.key for entry in glob_uris(f"{tmp_path}/**/a.txt")] == [
        f"{tmp_path}/two\nlines/a.txt"
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/homes/reader")
    assert absolute_uri("~t.txt") == f"{tmp_path}/~t.txt"
    assert absolute_uri("~/t.txt") == "/homes/reader/t.txt"


def test_keys_stay_below_their_root(storage: Storage) -> None:
    for key in ("../outside", "/etc/passwd", "a/../../b"):
        with pytest.raises(StorageError, match="leaves its folder"):
            storage.read_bytes(key)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        open_storage("runs").uri
        == f"{tmp_path}/runs"
        == open_storage(f"file://{tmp_path}/runs").uri
    )
    assert absolute_uri("s3://bucket/prefix/") == "s3://bucket/prefix"
    folder, name = split_uri("runs/a.txt")
    assert (folder.uri, name) == (f"{tmp_path}/runs", "a.txt")
    assert open_storage("s3://bucket").child("a").child("b").uri == "s3://bucket/a/b"
    with pytest.raises(
        StorageError,
        match=r"cannot open 'gs://bucket/x': expected a path, file:///.*, s3://.* or hf://",
    ):
        open_storage("gs://bucket/x")
    with pytest.raises(StorageError) as caught:
        open_storage("s3://KEY:sesame@bucket/x")
    assert "sesame" not in str(caught.value)


def test_links_that_loop_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.txt").write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [entry.key for entry in glob_uris(f"{tmp_path}/**/*.txt")] == [f"{tmp_path}/a/file.txt"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a/gone", "a/here.txt", "a/loop/", "other/"]),
        ("**/*.txt", ["a/here.txt", "a/loop/", "other/"]),
        ("a/g*", ["a/gone"]),
        ("a/**/*.txt", ["a/here.txt", "a/loop/"]),
        ("*/*.txt", ["a/here.txt", "other/"]),
        ("a*/*/*.txt", ["a/loop/"]),
        ("a/*.txt", ["a/here.txt"]),
    ],
)
def test_linked_folders_below_which_files_might_match_are_named(
    pattern: str, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "here.txt").write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other").symlink_to(tmp_path / "a")
    found = [
        entry.key.removeprefix(f"{tmp_path}/")
        for entry in glob_uris(f"{tmp_path}/{pattern}", names_others=True)
    ]
    assert found == names


def test_only_regular_files_are_listed_and_nothing_hangs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    (tmp_path / "nothing.txt").symlink_to("nowhere")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        # An absolute path may be too long for a socket
        listening.bind(os.path.relpath(tmp_path / "socket.txt"))
        storage = open_storage(str(tmp_path))
        assert [entry.key for entry in storage.list()] == ["a.txt", "link.txt"]
        assert [entry.key for entry in glob_uris(f"{tmp_path}/*.txt")] == [
            f"{tmp_path}/{n}.txt" for n in ("a", "link")
        ]
        for name in ("pipe.txt", "device.txt", "socket.txt", "itself.txt", "nothing.txt", "."):
            with pytest.raises(StorageError, match=f"{tmp_path}/?{name}".removesuffix(".")):
                storage.open(name)
            with pytest.raises(NotFoundError, match="nothing is at"):
                glob_uris(f"{tmp_path}/{name if name != '.' else 'none'}")


def test_a_folder_that_cannot_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "open").mkdir()
        (folder / "open" / "a.txt").write_text("x")
        (folder / "closed").mkdir(mode=0)
        folder.chmod(0o755)
        user = os.geteuid()
        if user == 0:  # whom no mode keeps out
            os.seteuid(65534)
        try:
            with pytest.raises(
                StorageError,
                match=f"{folder}/closed: permission denied; check the path, its rights",
            ):
                open_storage(name).list()
            with pytest.raises(StorageError, match="closed: permission denied"):
                glob_uris(f"{folder}/**/*.txt")
            assert [entry.key for entry in glob_uris(f"{folder}/open/*.txt")] == [
                f"{folder}/open/a.txt"
            ]
        finally:
            os.seteuid(user)


def test_a_failed_local_write_leaves_the_old_bytes_and_no_litter(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_bytes("file", b"old")
    with pytest.raises(TypeError):
        storage.write_bytes("file", "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes("file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "taken").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="taken/x: "):
        storage.write_bytes("taken/x", b"1")


def test_what_a_killed_upload_leaves_can_be_removed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    version = storage.write_bytes("folder/other", b"1")
    storage.write_bytes("folder/other", b"2", if_version=version)
    left = killed_upload(tmp_path, "folder/file")
    assert [entry.key for entry in storage.list()] == ["folder/other"]
    storage.child("another").abort_uploads()
    assert left.exists()
    storage.abort_uploads()
    assert not left.exists()
    assert storage.read_bytes("folder/other") == b"2"


def test_an_object_that_changes_while_read_is_named(s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}")
    storage.write_bytes("big", b"a" * (9 << 20))
    with storage.open("big") as file:
        assert file.read(10) == b"a" * 10
        storage.write_bytes("big", b"b" * (9 << 20))
        with pytest.raises(
            StorageError, match=f"s3://{s3_bucket}/big was changed or removed by another process"
        ):
            file.read()


def test_missing_bucket_is_one_clear_sentence(s3_server: str) -> None:
    storage = open_storage("s3://no-such-bucket/data")
    actions: list[Callable[[], object]] = [
        lambda: storage.read_bytes("x"),
        lambda: storage.write_bytes("x", b""),
        storage.list,
        lambda: storage.exists("x"),
        lambda: storage.open("x"),
        lambda: glob_uris("s3://no-such-bucket/data/*.txt"),
        lambda: storage.upload_file(Path(__file__), "x"),
    ]
    for action in actions:
        with pytest.raises(
            StorageError, match=r"there is no bucket 'no-such-bucket' at .*; create it"
        ) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_unreachable_endpoint_and_missing_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    with pytest.raises(
        StorageError, match=r"http://127\.0\.0\.1:9 cannot be reached; check AWS_ENDPOINT_URL"
    ):
        open_storage("s3://bucket").list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:10")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    boto3.setup_default_session()
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_storage("s3://bucket").list()


def test_denied(s3_server: str, s3_bucket: str) -> None:
    resource = f"arn:aws:s3:::{s3_bucket}/*"
    rule = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": resource}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
    boto3.client("s3", endpoint_url=s3_server).put_bucket_policy(Bucket=s3_bucket, Policy=policy)
    with pytest.raises(StorageError, match="access denied"):
        open_storage(f"s3://{s3_bucket}").read_bytes("x")
