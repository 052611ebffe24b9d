"""An index has the same bytes for any order of its tasks, and after a build that was ended."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage.uris import open_storage
from jobs.corpus.ray_data_tasks import Result
from jobs.tokens.inspect_store import verify
from jobs.tokens.token_store import read_manifest
from jobs.trace import build_index
from jobs.trace.build_index import index_store
from jobs.trace.trace_index import INDEX, TRACE, TraceIndex
from jobs.trace.windows import LEAST_SPAN, chosen_windows
from raymill.errors import UserError
from tests.jobs.cleaning.in_process import InProcess
from tests.jobs.stores import make_store
from tests.killed_upload import killed_upload

SIZES = (3000, 11, 12, 0, 7000, 2500)
VOCAB_SIZE = 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that is cut into several sections, and its index into several parts."""
    monkeypatch.setattr(build_index, "_SECTION_TOKENS", 1700)
    monkeypatch.setattr(build_index, "_READ_TOKENS", 500)
    monkeypatch.setattr(build_index, "_PART_BYTES", 9000)
    make_store(open_storage(str(tmp_path / "one")), sizes=SIZES, vocab_size=VOCAB_SIZE)
    return tmp_path / "one"


def content_of(folder: Path) -> dict[str, bytes]:
    trace = folder / TRACE
    files = [path for path in trace.rglob("*") if path.is_file()]
    return {str(path.relative_to(trace)): path.read_bytes() for path in files}


def index(folder: Path, run: Callable[..., Iterator[Result[Any]]]) -> dict[str, bytes]:
    index_store(open_storage(str(folder)), run=run)
    return content_of(folder)


class Ended:
    """Does some tasks, and then no more."""

    def __init__(self, num_tasks: int) -> None:
        self._left = num_tasks

    def __call__(self, items: Sequence[Any], work: Callable[[Any], bytes]) -> Iterator[Result[Any]]:
        for item in items:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield Result(item, work(item), 0)


def test_the_bytes_are_the_same_for_any_order_and_any_sections(
    folder: Path, tmp_path: Path
) -> None:
    copies = [shutil.copytree(folder, tmp_path / name) for name in ("mixed", "mixed again")]
    expected = index(folder, InProcess())
    killed_upload(copies[0], f"{TRACE}/of a worker that was killed")
    assert len(expected) > 3, "several parts"
    assert not any("sent" in name for name in expected), "what led to it is deleted"
    for seed, copy in enumerate(copies, start=1):
        assert index(copy, InProcess(seed)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_index, "_SECTION_TOKENS", 100_000)
        again = index(shutil.copytree(folder, tmp_path / "whole"), InProcess())
    assert again == expected


@pytest.mark.parametrize("num_tasks", [0, 3, 8, 11])
def test_a_build_that_was_ended_goes_on(folder: Path, tmp_path: Path, num_tasks: int) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    expected = index(copy, InProcess())
    total = InProcess()
    index(shutil.copytree(folder, tmp_path / "counted"), total)
    assert num_tasks < total.num_tasks
    with pytest.raises(KeyboardInterrupt):
        index(folder, Ended(num_tasks))
    with pytest.raises(UserError, match="has no trace index"):
        TraceIndex(open_storage(str(folder)), read_manifest(open_storage(str(folder))))
    before = {path: path.stat().st_mtime_ns for path in (folder / TRACE).rglob("part-*")}
    assert index(folder, InProcess()) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_an_index_that_was_altered_is_made_again(folder: Path) -> None:
    expected = index(folder, InProcess())
    part = min((folder / TRACE).rglob("part-*"))
    altered = bytearray(part.read_bytes())
    altered[-1] ^= 1
    part.write_bytes(altered)
    assert index(folder, InProcess()) == expected
    part.unlink()
    assert index(folder, InProcess()) == expected
    store, listed = open_storage(str(folder)), folder / TRACE / INDEX
    other = listed.read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    for content, why in ((b"{", r"is missing or damaged"), (other, r"has another format")):
        listed.write_bytes(content)
        with pytest.raises(UserError, match=rf"{why}; `raymill trace index {folder}` makes"):
            TraceIndex(store, read_manifest(store))
        assert index(folder, InProcess()) == expected


def test_each_window_that_is_chosen_is_in_the_index_once(folder: Path) -> None:
    index(folder, InProcess())
    store = open_storage(str(folder))
    manifest = read_manifest(store)
    known = TraceIndex(store, manifest)
    expected: dict[int, list[int]] = {}
    first = 0
    for shard in manifest.shards:
        tokens = np.frombuffer(store.read_bytes(shard.file), manifest.dtype).astype(np.uint64)
        places, hashes = chosen_windows(tokens, border=manifest.eot_id)
        for place, window in zip(places.tolist(), hashes.tolist(), strict=True):
            expected.setdefault(window, []).append(first + place)
        first += shard.tokens
    assert known.listed.entries == sum(map(len, expected.values()))
    hits = known.find([*expected], most=1 << 20)
    assert [hit.places.tolist() for hit in hits] == [*expected.values()]
    assert [hit.total for hit in known.find([12345 << 32, 0], most=10)] == [0, 0]


def test_an_index_is_found_and_the_store_is_as_it_was(folder: Path) -> None:
    store = open_storage(str(folder))
    before = verify(store)
    first = index_store(store, run=InProcess())
    unused = InProcess()
    assert index_store(store, run=unused) == first
    assert not unused.num_tasks
    assert verify(store) == before
    assert first["bytes_per_token"] < 5


def test_any_twelve_tokens_in_a_row_choose_the_same_window_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    for alphabet in (1, 2, 3, 1000):
        shared = rng.integers(0, alphabet, LEAST_SPAN)
        places, hashes = chosen_windows(shared.astype(np.uint64), border=alphabet)
        assert len(places) == 1
        around = [rng.integers(0, alphabet, n) for n in (9, 30)]
        text = np.concatenate([around[0], shared, around[1]]).astype(np.uint64)
        in_text, text_hashes = chosen_windows(text, border=alphabet)
        at = in_text.tolist().index(9 + int(places[0]))
        assert text_hashes[at] == hashes[0]
