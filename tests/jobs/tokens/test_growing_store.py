"""Reading a store while it is written: the same rows as from the finished one, none that is not sealed, no endless wait."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from cluster.storage.folder import LocalStorage
from cluster.storage.uris import NotFoundError, Storage, open_storage
from jobs.tokens.growing_store import Clock
from jobs.tokens.token_store import MANIFEST, SEALED, Manifest, Shard, TokenStoreError
from jobs.tokens.token_stream import TokenStream
from model.errors import UserError
from tests.jobs.stores import manifest_of, write_shard
from tests.time_limits import limit_s

FAST = Clock(poll_s=0.001)


class GrowingFolder(LocalStorage):
    """A store written shard by shard; reading a shard that is not sealed fails."""

    def local_path(self, key: str) -> Path:
        if key.endswith(".bin"):
            try:
                manifest = self.read_bytes(MANIFEST if self.exists(MANIFEST) else SEALED)
            except NotFoundError:  # the writer has just finished
                manifest = self.read_bytes(MANIFEST)
            listed = {shard.file for shard in Manifest.from_json(manifest).shards}
            assert key in listed, f"{key} is read before it is sealed"
        return super().local_path(key)


def planned(folder: Path, weights: tuple[float, ...]) -> tuple[Storage, Manifest]:
    """Returns all shards of a store, written elsewhere, in canonical order."""
    storage = open_storage(str(folder))
    random = np.random.default_rng(5)
    sizes = [(source, int(random.integers(1, 120))) for source in (0, 1) for _ in range(8)]
    shards = []
    for number, (source, size) in enumerate(sizes):
        split = "val" if number % 4 == 3 else "train"
        shards.append(write_shard(storage, number, size, split=split, source=source)[0])  # type: ignore[arg-type]
    manifest = manifest_of(shards, weights=weights)
    storage.write_bytes(MANIFEST, manifest.to_json())
    return storage, manifest


def grow(source: Storage, target: Storage, manifest: Manifest, *, seed: int, may_finish: threading.Event) -> None:
    """Writes the shards in random order, seals what is complete from the front of each source, and finishes."""
    random = np.random.default_rng(seed)
    done: set[Shard] = set()
    for number in random.permutation(len(manifest.shards)).tolist():
        shard = manifest.shards[number]
        target.write_bytes(shard.file, source.read_bytes(shard.file))
        done.add(shard)
        seal(target, manifest, done)
        threading.Event().wait(0.004)
    may_finish.wait(limit_s(30))
    target.write_bytes(MANIFEST, manifest.to_json())
    target.delete(SEALED)


def seal(target: Storage, manifest: Manifest, done: set[Shard]) -> None:
    sealed: list[Shard] = []
    for source in (0, 1):
        for shard in (shard for shard in manifest.shards if shard.source == source):
            if shard not in done:
                break
            sealed.append(shard)
    target.write_bytes(SEALED, dataclasses.replace(manifest, shards=tuple(sealed), complete=False).to_json())


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)])
@pytest.mark.parametrize("seed", range(4))
def test_the_rows_are_those_of_the_finished_store(weights: tuple[float, ...], seed: int, tmp_path: Path) -> None:
    finished, manifest = planned(tmp_path / "finished", weights)
    options = {"seq_len": 7, "seed": 2, "window_rows": 6}
    expected = TokenStream(finished, split="train", **options)  # type: ignore[arg-type]
    target = GrowingFolder(tmp_path / "growing")
    may_finish = threading.Event()
    options_of_writer = {"seed": seed, "may_finish": may_finish}
    writer = threading.Thread(
        target=grow, args=(finished, open_storage(target.uri), manifest), kwargs=options_of_writer, daemon=True
    )
    writer.start()
    stream = TokenStream(target, split="train", growing=True, clock=FAST, **options)  # type: ignore[arg-type]
    val = TokenStream(target, split="val", growing=True, clock=FAST, seq_len=7)
    assert val.count_rows(at_most=2) == 2
    held_out = val.rows([0, 1])[0]
    early = 0
    for step in range(40):  # more than an epoch
        samples = np.arange(step * 6, step * 6 + 6)
        stream.read_ahead(np.arange(step * 6, step * 6 + 12))
        assert stream.samples(samples)[0].tolist() == expected.samples(samples)[0].tolist()
        early += not stream.manifest.complete
        may_finish.set()
    writer.join()
    assert early > 0  # some were read before the end
    assert stream.manifest.complete
    assert stream.count_rows() == expected.count_rows()
    finished_val = TokenStream(finished, split="val", seq_len=7)
    assert held_out.tolist() == finished_val.rows([0, 1])[0].tolist()
    assert val.count_rows() == finished_val.count_rows()
    assert val.bytes_per_token(2) == finished_val.bytes_per_token(2)


def sealed_at(tmp_path: Path, *, num_shards: int = 6) -> tuple[Storage, Manifest]:
    storage, manifest = planned(tmp_path, ())
    storage.delete(MANIFEST)
    seal(storage, manifest, set(manifest.shards[:num_shards]))
    return storage, manifest


def test_a_failed_writer_ends_the_wait_and_is_noticed_between_reads(tmp_path: Path) -> None:
    storage, _ = sealed_at(tmp_path)
    failures: list[str] = []
    slept: list[float] = []
    clock_s = 0.0

    def check() -> None:
        if failures:
            raise UserError(failures[0])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        failures[:] = ["the corpus is gone"] if len(slept) == 3 else []

    clock = Clock(poll_s=2.0, sleep=sleep, now=lambda: clock_s)
    stream = TokenStream(storage, split="train", seq_len=4, window_rows=1, growing=True, check=check, clock=clock)
    stream.samples([0, 1, 2])
    with pytest.raises(UserError, match="the corpus is gone"):
        stream.samples([10**6])
    assert slept == [2.0] * 3
    stream.samples([0])  # looked a moment ago
    clock_s = 2.0
    with pytest.raises(UserError, match="the corpus is gone"):
        stream.samples([0])


def test_how_many_rows_there_are_is_known_at_the_end_only(tmp_path: Path) -> None:
    storage, manifest = sealed_at(tmp_path)

    def finish(seconds: float) -> None:
        storage.write_bytes(MANIFEST, manifest.to_json())

    stream = TokenStream(storage, split="train", seq_len=4, growing=True, clock=Clock(sleep=finish))
    assert stream.count_rows(at_most=3) == 3
    assert not storage.exists(MANIFEST)
    assert stream.count_rows() == (manifest.total("tokens", "train") - 1) // 4


def test_another_store_in_its_place_is_noticed_and_a_restarted_writer_is_none(tmp_path: Path) -> None:
    storage, manifest = sealed_at(tmp_path)
    steps = [
        lambda: seal(storage, manifest, set(manifest.shards[:2])),  # a restarted writer seals from the front again
        lambda: seal(storage, manifest, set(manifest.shards[:3])),
        lambda: storage.write_bytes(SEALED, dataclasses.replace(manifest, source_hash="x", complete=False).to_json()),
    ]
    clock = Clock(sleep=lambda seconds: steps.pop(0)())
    stream = TokenStream(storage, split="train", seq_len=4, window_rows=1, growing=True, clock=clock)
    with pytest.raises(TokenStoreError, match="was replaced while it was read; start again"):
        stream.samples([10**6])
    assert not steps


def test_without_growing_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    storage, _ = sealed_at(tmp_path)
    with pytest.raises(TokenStoreError, match=r"holds no manifest.json: tokenizing was not finished"):
        TokenStream(storage, split="train", seq_len=4)
