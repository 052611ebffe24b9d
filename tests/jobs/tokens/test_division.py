"""A store's text is divided by whole documents where these are enough, else at its end, and no
token is in both parts."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage.uris import open_storage
from jobs.tokens.division import BY_DOCUMENTS, Division, HeldOut, divide, texts_of, token_count
from jobs.tokens.token_store import MANIFEST, Manifest, Shard, Split, TokenStoreError
from jobs.tokens.token_stream import TokenStream
from tests.jobs.stores import manifest_of, write_shard

SEQ_LEN = 10
Sizes = list[tuple[Split, int, int]]  # split, source and tokens of each shard


def made(sizes: Sizes, weights: tuple[float, ...] = ()) -> Manifest:
    shards = [
        Shard(str(n), split, source, size, 1, size, "")
        for n, (split, source, size) in enumerate(sizes)
    ]
    return manifest_of(shards, weights=weights)


def decided(manifest: Manifest, *, val_fraction: float = 0.05, has_sets: bool = False) -> Division:
    return divide(manifest, seq_len=SEQ_LEN, val_fraction=val_fraction, has_sets=has_sets)


@pytest.mark.parametrize(
    ("sizes", "weights", "val_fraction", "expected"),
    [
        ([("train", 0, 11), ("val", 0, 11)], (), 0.5, BY_DOCUMENTS),
        # A finished store that has the split
        ([("train", 0, 300), ("val", 0, 11)], (), 0.0, BY_DOCUMENTS),
        ([("train", 0, 11), ("val", 0, 11), ("train", 1, 11)], (0.5, 0.5), 0.5, BY_DOCUMENTS),
        ([("train", 0, 1000)], (), 0.05, Division(HeldOut.END, 51)),
        ([("train", 0, 1000)], (), 0.001, Division(HeldOut.END, 11)),  # a row at least
        ([("train", 0, 22)], (), 0.05, Division(HeldOut.END, 11)),
        ([("train", 0, 1000)], (), 0.999, Division(HeldOut.END, 981)),  # a row trains at least
        (
            [("train", 0, 500), ("val", 0, 10), ("train", 0, 490)],
            (),
            0.05,
            Division(HeldOut.END, 51),
        ),
        # The long text was to validate
        ([("train", 0, 10), ("val", 0, 990)], (), 0.05, Division(HeldOut.END, 51)),
        # All of a source was
        ([("val", 0, 100), ("train", 1, 200)], (0.5, 0.5), 0.05, Division(HeldOut.END, 11)),
        ([("train", 0, 400), ("train", 1, 200)], (0.5, 0.5), 0.05, Division(HeldOut.END, 21)),
    ],
)
def test_whole_documents_are_held_out_where_they_are_enough_else_the_end(
    sizes: Sizes, weights: tuple[float, ...], val_fraction: float, expected: Division
) -> None:
    assert decided(made(sizes, weights), val_fraction=val_fraction) == expected


def test_sets_alone_validate_where_nothing_is_to_be_held_out() -> None:
    manifest = made([("train", 0, 11)])
    assert decided(manifest, val_fraction=0.0, has_sets=True) == Division(HeldOut.NOTHING)
    assert [
        token_count(text) for text in texts_of(manifest, "train", Division(HeldOut.NOTHING))
    ] == [11]


@pytest.mark.parametrize(
    ("sizes", "weights", "settings", "message"),
    [
        (
            [("train", 0, 10)],
            (),
            {},
            "the text has 10 tokens to train on, a row needs 11 (train.seq_len + 1); add",
        ),
        (
            [("train", 0, 21)],
            (),
            {},
            "a row to train and a row to validate need 22 (train.seq_len + 1 each)",
        ),
        (
            [("train", 0, 21)],
            (),
            {"has_sets": True},
            "lower train.seq_len; or set data.val_fraction to 0, as data.va",
        ),
        (
            [("train", 0, 99)],
            (),
            {"val_fraction": 0.0},
            "data.val_fraction is 0 and data.validation names no text",
        ),
        (
            [("train", 0, 10)],
            (),
            {"val_fraction": 0.0, "has_sets": True},
            "the text has 10 tokens to train on",
        ),
        (
            [("train", 0, 99), ("val", 1, 9)],
            (0.5, 0.5),
            {},
            "data.source[1] has 9 tokens to train on",
        ),
        (
            [("train", 0, 99)],
            (0.5, 0.5),
            {"val_fraction": 0.0},
            "data.source[1] has 0 tokens to train on",
        ),
    ],
)
def test_what_cannot_train_or_validate_is_refused(
    sizes: Sizes, weights: tuple[float, ...], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(TokenStoreError, match=re.escape(message)):
        decided(made(sizes, weights), **settings)  # type: ignore[arg-type]


shard_sizes = st.lists(
    st.tuples(st.sampled_from(["train", "val"]), st.integers(0, 2), st.integers(1, 60)),
    min_size=1,
    max_size=8,
)


@given(sizes=shard_sizes, is_weighted=st.booleans(), val_fraction=st.floats(0.001, 0.999))
def test_each_token_trains_or_validates_and_each_part_has_a_row(
    sizes: Sizes, is_weighted: bool, val_fraction: float
) -> None:
    ordered = sorted(sizes, key=lambda size: size[1])
    manifest = made(ordered, (0.2, 0.3, 0.5) if is_weighted else ())
    try:
        division = decided(manifest, val_fraction=val_fraction)
    except TokenStoreError:
        return
    train, val = (texts_of(manifest, split, division) for split in ("train", "val"))
    assert min(token_count(text) for text in [*train, *val]) > SEQ_LEN
    tokens = [
        (piece.shard.file, place)
        for text in [*train, *val]
        for piece in text
        for place in range(piece.start, piece.end)
    ]
    assert len(set(tokens)) == len(tokens) == manifest.total("tokens")


@pytest.mark.parametrize("weights", [(), (0.75, 0.25)])
def test_rows_of_the_end_follow_those_that_train(
    weights: tuple[float, ...], tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path))
    places: Sizes = [("train", 0, 70), ("val", 0, 7), ("train", 0, 130), ("train", 1, 34)]
    written = [
        write_shard(storage, n, size, split=split, source=source)
        for n, (split, source, size) in enumerate(places)
    ]
    storage.write_bytes(
        MANIFEST, manifest_of([shard for shard, _ in written], weights=weights).to_json()
    )
    texts = [np.concatenate([tokens for _, tokens in written[:3]]), written[3][1]]
    if not weights:
        texts = [np.concatenate(texts)]
    division = Division(HeldOut.END, 51)
    val = TokenStream(storage, split="val", seq_len=SEQ_LEN, division=division)
    train = TokenStream(
        storage, split="train", seq_len=SEQ_LEN, seed=1, window_rows=3, division=division
    )
    end, front = texts[0][-51:], texts[0][:-51]
    assert val.rows(range(5))[0].reshape(-1).tolist() == end[:-1].tolist()
    assert val.rows(range(5))[1].reshape(-1).tolist() == end[1:].tolist()
    assert (val.count_rows(), val.order.weights) == (5, ())
    assert train.order.num_rows == tuple((len(text) - 1) // SEQ_LEN for text in [front, *texts[1:]])
    samples = np.arange(100)
    sources, rows = train.order.rows(samples)
    for source, row, ids in zip(sources, rows, train.samples(samples)[0], strict=True):
        assert (
            ids.tolist()
            == [front, *texts[1:]][source][row * SEQ_LEN : (row + 1) * SEQ_LEN].tolist()
        )
