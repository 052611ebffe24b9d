"""Copies of remote files on a node: proven, within the bound, each fetched once by whichever
process comes first."""

import hashlib
import logging
import os
import random
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Entry, Storage, open_storage
from tests.cluster.fault_proxy import Cut, FaultProxy, Stalled
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

SIZE = 20_000

WANT = """
import sys, time
from pathlib import Path
from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Entry, open_storage
uri, folder, *files = sys.argv[1:]
wanted = [Entry(key, int(size), sha256) for key, size, sha256 in (each.split(":") for each in files)]
cache = FileCache(open_storage(uri), Path(folder), max_bytes=1 << 30)
cache.want(wanted)
print("wanted", flush=True)
while not all((cache.folder / file.version).exists() for file in wanted):
    time.sleep(0.01)
"""


@pytest.fixture
def storage(proxy: FaultProxy, s3_bucket: str) -> Storage:
    return open_storage(f"s3://{s3_bucket}/store")


def stored(storage: Storage, *numbers: int, size: int = SIZE) -> list[Entry]:
    contents = {f"file-{number}": random.Random(number).randbytes(size) for number in numbers}
    for key, content in contents.items():
        storage.write_bytes(key, content)
    return [
        Entry(key, size, hashlib.sha256(content).hexdigest()) for key, content in contents.items()
    ]


def are_here(cache: FileCache, files: list[Entry]) -> list[bool]:
    return [(cache.folder / file.version).exists() for file in files]


def process(storage: Storage, folder: Path, files: list[Entry]) -> subprocess.Popen[str]:
    named = [f"{file.key}:{file.size}:{file.version}" for file in files]
    command = [sys.executable, "-c", WANT, storage.uri, str(folder), *named]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | {}, stdout=subprocess.PIPE, text=True
    )


def test_the_copies_are_the_files(storage: Storage, tmp_path: Path) -> None:
    files = [*stored(storage, 1, 2, 3), *stored(storage, 4, size=9 << 20)]
    cache = FileCache(storage, tmp_path / "cache", max_bytes=1 << 30)
    cache.want(files)
    wait_until(lambda: all(are_here(cache, files)))
    for file in files:
        assert (cache.folder / file.version).read_bytes() == storage.read_bytes(file.key)


def test_the_processes_of_a_node_fetch_each_file_once(
    storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    files = stored(storage, *range(30))
    proxy.spoil = lambda method, path: Stalled(0.05)
    processes = [process(storage, tmp_path / "cache", files) for _ in range(3)]
    for each in processes:
        assert each.wait(limit_s(60)) == 0
    assert len(proxy.ranges) == len(files)


def test_what_a_killed_process_left_half_is_fetched_again(
    storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    files = stored(storage, 1, 2)
    proxy.spoil = lambda method, path: Stalled(30)
    killed = process(storage, tmp_path / "cache", files)
    wait_until((tmp_path / "cache" / "partial").exists)
    killed.kill()
    killed.wait()
    assert not any((tmp_path / "cache" / file.version).exists() for file in files)
    proxy.spoil = None
    assert process(storage, tmp_path / "cache", files).wait(limit_s(60)) == 0
    assert not (tmp_path / "cache" / "partial").exists()


def test_the_folder_never_exceeds_the_bound(storage: Storage, tmp_path: Path) -> None:
    files = stored(storage, *range(12))
    folder, bound = tmp_path / "cache", 5 * SIZE + 100
    cache = FileCache(storage, folder, max_bytes=bound)
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            found = list(folder.iterdir()) if folder.exists() else []
            with suppress(FileNotFoundError):  # another look will see it under its name
                largest = max(largest, sum(path.stat().st_size for path in found))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        cache.want(files[:4])
        wait_until(lambda: all(are_here(cache, files[:4])))
        cache.want(files[2:6])
        wait_until(lambda: all(are_here(cache, files[2:6])))
        assert sum(are_here(cache, files[:2])) == 1  # one had to go
        cache.want(files[6:])  # more than there is room for: the first ones are kept
        wait_until(lambda: all(are_here(cache, files[6:11])))
        assert not any(are_here(cache, [*files[:6], files[11]]))
    finally:
        done.set()
        watcher.join()
    assert 4 * SIZE <= largest <= bound


def test_an_altered_file_is_named_and_not_kept(storage: Storage, tmp_path: Path) -> None:
    files = stored(storage, 1, 2, 3)
    storage.write_bytes(files[1].key, bytes(SIZE))
    cache = FileCache(storage, tmp_path / "cache", max_bytes=1 << 30)
    cache.want(files)
    wait_until(lambda: cache.altered and all(are_here(cache, [files[0], files[2]])))
    (said,) = cache.altered
    assert (
        f"/store/file-2 has SHA-256 {hashlib.sha256(bytes(SIZE)).hexdigest()[:12]}…, the manifest says"
        in said
    )
    assert are_here(cache, files) == [True, False, True]


def test_an_outage_is_waited_for(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    files = stored(storage, 1, 2)
    proxy.script = [Cut(5)] * 4
    cache = FileCache(storage, tmp_path / "cache", max_bytes=1 << 30)
    cache.want(files)
    wait_until(lambda: all(are_here(cache, files)))
    assert len(proxy.ranges) == 6


def test_without_a_place_nothing_is_kept_and_nothing_fails(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = stored(storage, 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = FileCache(storage, tmp_path / "cache", max_bytes=1 << 30)
    cache.want(files)
    wait_until(lambda: "0 of the next 1 files are in" in caplog.text)
