"""Packing: pure decisions over the index, checked against plain loops."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.corpus_index import DROP_CODES, INDEX_DTYPE, CorpusIndex
from jobs.documents import Drop
from jobs.packing import count_drops, drop_duplicates, plan_shards, validation_mask

texts = st.lists(st.binary(max_size=3), max_size=40)


def make_index(texts: list[bytes]) -> CorpusIndex:
    """Empty texts are dropped, as the readers do."""
    index = np.zeros(len(texts), dtype=INDEX_DTYPE)
    for place, text in enumerate(texts):
        digest = np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint8)
        code = 0 if text else DROP_CODES.index(Drop.EMPTY)
        index[place] = (place // 3, place, len(text), code, 0, digest)
    return index


@given(texts)
def test_the_first_of_equal_texts_is_kept(texts: list[bytes]) -> None:
    index = drop_duplicates(make_index(texts))
    expected = ["empty" if not t else "duplicate" if t in texts[:i] else None for i, t in enumerate(texts)]
    assert [DROP_CODES[code] for code in index["drop"]] == expected
    counts = count_drops(index)
    assert counts["duplicate"] == expected.count("duplicate")
    assert list(counts) == list(Drop)


@given(texts, st.integers(1, 12), st.floats(0, 0.99))
def test_shards_hold_every_kept_document_once_in_order(texts: list[bytes], shard_bytes: int, fraction: float) -> None:
    index = drop_duplicates(make_index(texts))
    plans = plan_shards(index, val_fraction=fraction, shard_bytes=shard_bytes)
    kept = index[index["drop"] == 0]["offset"].tolist()
    for split in ("train", "val"):
        parts = [plan for plan in plans if plan.split == split]
        places = [place for plan in parts for place in plan.documents["offset"].tolist()]
        assert places == sorted(places)
        kept = [place for place in kept if place not in places]
        prefix = "shard" if split == "train" else "val"
        assert [plan.file for plan in parts] == [f"{prefix}-{number:05d}.bin" for number in range(len(parts))]
        for plan in parts:
            assert len(plan.documents)
            assert plan.documents["size"][:-1].sum() < shard_bytes
    assert kept == []


@given(st.sets(st.binary(min_size=1, max_size=4), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_a_split_depends_on_the_document_alone(texts: set[bytes], fraction: float) -> None:
    hashes = make_index(sorted(texts))["hash"]
    mask = validation_mask(hashes, fraction)
    values = [int.from_bytes(row.tobytes()[:8]) / 2**64 for row in hashes]
    expected = [value < fraction for value in values]
    if not any(expected):
        expected[values.index(min(values))] = True
    if all(expected):
        expected[values.index(max(values))] = False
    assert mask.tolist() == expected
    assert not validation_mask(hashes, 0.0).any()
    assert not validation_mask(hashes[:1], fraction).any()
