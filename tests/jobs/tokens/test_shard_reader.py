"""Reading shards: within the bound in memory and open files, ahead of need, and with the storage's
own errors."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cluster.storage.file_cache import FileCache
from cluster.storage.folder import LocalStorage
from cluster.storage.uris import NotFoundError, Storage, StorageError, open_storage
from jobs.tokens import shard_reader
from jobs.tokens.shard_reader import _MAX_MAPS, _NUM_THREADS, Piece, ShardReader
from jobs.tokens.token_store import Shard
from tests.jobs.stores import write_shard
from tests.time_limits import limit_s
from tests.waiting import wait_until

FILE, OTHER, MISSING = (
    Shard(name, "train", 0, 1000, 1, 1000, name) for name in ("file", "other", "missing")
)


@dataclass(frozen=True)
class Watched(LocalStorage):
    """A folder whose reads can be counted, held back and failed."""

    reads: list[tuple[str, int, int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    broken: set[str] = field(default_factory=set)

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        assert end is not None
        self.reads.append((key, start, end))
        assert self.gate.wait(limit_s(10))
        if key in self.broken:
            raise StorageError(f"{key}: the disk is on fire")
        return super().read_bytes(key, start=start, end=end)


@pytest.fixture
def storage(tmp_path: Path) -> Watched:
    (tmp_path / "file").write_bytes(bytes(range(250)) * 4)
    (tmp_path / "other").write_bytes(bytes(1000))
    watched = Watched(tmp_path)
    watched.gate.set()
    return watched


def reader_of(storage: Storage, dtype: str) -> ShardReader:
    return ShardReader(
        storage, np.dtype(dtype), near=FileCache(storage, Path("/nowhere"), max_bytes=0)
    )


def elsewhere(storage: Storage) -> ShardReader:
    """Returns a reader of bytes that maps no file, as if the storage were remote."""
    reader = reader_of(storage, "u1")
    reader._on_disk = lambda shard: None  # type: ignore[method-assign]
    return reader


def ranges_of(pieces: list[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.shard.file, piece.start, piece.end) for piece in pieces]


def test_neighbors_share_a_block_and_the_last_blocks_are_kept(
    storage: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "BLOCK_BYTES", 100)
    monkeypatch.setattr(shard_reader, "_MAX_BLOCKS", 3)
    cache = elsewhere(storage)
    blocks = [Piece(FILE, start, start + 100) for start in range(0, 500, 100)]
    for number in (0, 1, 2, 0, 3):
        for start in (20, 70):
            begin = number * 100 + start
            assert cache.read(Piece(FILE, begin, begin + 20), scattered=False)[0] == begin % 250
    assert storage.reads == ranges_of(blocks[:4])
    for number in (0, 2, 3, 1):
        cache.read(blocks[number], scattered=False)
    assert storage.reads[4:] == ranges_of(blocks[1:2])


def test_what_is_read_ahead_is_read_once_and_few_at_a_time(storage: Watched) -> None:
    storage.gate.clear()
    reader = elsewhere(storage)
    wanted = [Piece(FILE, start, start + 50) for start in range(0, 1000, 50)]
    reader.read_ahead(wanted)
    reader.read_ahead(wanted[:15])
    wait_until(lambda: len(storage.reads) == _NUM_THREADS)
    time.sleep(0.05)
    # On their way although no read waits for them
    assert storage.reads == ranges_of(wanted[:_NUM_THREADS])
    storage.gate.set()
    for piece in wanted[:15]:
        assert reader.read(piece, scattered=True)[0] == piece.start % 250
    assert sorted(storage.reads) == ranges_of(wanted[:15])
    reader.read(wanted[0], scattered=True)  # not held: it was taken
    assert storage.reads[15:] == ranges_of(wanted[:1])


def test_a_new_wish_replaces_the_old_one(storage: Watched) -> None:
    cache = elsewhere(storage)
    old, new = (
        [Piece(shard, start, start + 100) for start in (0, 100, 200)] for shard in (FILE, OTHER)
    )
    cache.read_ahead(old)
    cache.read_ahead(new)
    assert [cache.read(piece, scattered=True).tobytes() for piece in new] == [bytes(100)] * 3
    assert set(ranges_of(new)) <= set(storage.reads) <= set(ranges_of([*old, *new]))


def test_an_error_ahead_surfaces_at_its_read_and_may_pass(storage: Watched) -> None:
    storage.broken.add("other")
    cache = elsewhere(storage)
    cache.read_ahead([Piece(FILE, 0, 10), Piece(OTHER, 0, 10), Piece(MISSING, 0, 10)])
    assert cache.read(Piece(FILE, 0, 10), scattered=True).tobytes() == bytes(range(10))
    with pytest.raises(StorageError, match="other: the disk is on fire"):
        cache.read(Piece(OTHER, 0, 10), scattered=True)
    with pytest.raises(NotFoundError, match="missing does not exist"):
        cache.read(Piece(MISSING, 0, 10), scattered=True)
    storage.broken.clear()
    assert cache.read(Piece(OTHER, 0, 10), scattered=True).tobytes() == bytes(10)


def test_a_store_of_many_shards_holds_few_files_open(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    written = [write_shard(storage, number, 3) for number in range(_MAX_MAPS + 60)]
    reader = reader_of(storage, "<u2")
    for _ in range(2):
        for shard, tokens in written:
            assert reader.read(Piece(shard, 1, 3), scattered=True).tolist() == tokens[1:].tolist()
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(tmp_path)) <= _MAX_MAPS
    del reader


@pytest.mark.parametrize("scattered", [True, False])
def test_remote_tokens_are_the_shards(scattered: bool, s3_bucket: str) -> None:
    storage: Storage = open_storage(f"s3://{s3_bucket}/store")
    shard, tokens = write_shard(storage, 0, 1_200_000)  # three blocks
    reader = reader_of(storage, "<u2")
    starts = [0, 524_280, 1_199_900, *np.random.default_rng(0).integers(0, 1_199_900, 6).tolist()]
    pieces = [Piece(shard, start, start + 100) for start in starts]
    if scattered:
        reader.read_ahead(pieces)
    for piece in pieces:
        assert (
            reader.read(piece, scattered=scattered).tolist()
            == tokens[piece.start : piece.end].tolist()
        )
