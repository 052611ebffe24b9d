"""Selection: what is kept and where it goes, checked against plain loops, whatever the order of
arrival."""

import hashlib
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage, open_storage
from jobs.cleaning import selection
from jobs.cleaning.duplicates import SIGNATURE_SIZE
from jobs.cleaning.selection import HELD_OUT, Summary, stored_codes
from jobs.cleaning.why_dropped import DROP_CODES
from jobs.corpus.documents import Drop
from jobs.corpus.text_hashes import document_hash, word_ngrams
from tests.jobs.cleaning.in_process import MEMORY, InProcess, signature, store_index

chunks_of_texts = st.lists(
    st.lists(st.text("abcde", max_size=2).map(str.encode), max_size=12), min_size=1, max_size=5
)


def index(store: Storage, number: int, texts: list[bytes]) -> tuple[bytes, int]:
    """Stores the index of a chunk, in which empty texts are dropped as such."""
    hashes = [document_hash(text) if text else bytes(16) for text in texts]
    return store_index(
        store,
        number,
        hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
        signatures=np.array([signature(word_ngrams(text, 3)) for text in texts]).reshape(
            -1, SIGNATURE_SIZE
        ),
        drops=[0 if text else DROP_CODES[Drop.EMPTY] for text in texts],
        digest=hashlib.sha256(b"".join(texts)).digest(),
    )


def select(
    chunks: list[list[bytes]], *, seed: int = 0, **data: object
) -> tuple[Summary, list[list[int]]]:
    with TemporaryDirectory(dir=MEMORY) as folder:
        store = open_storage(folder)
        indexed = [index(store, number, texts) for number, texts in enumerate(chunks)]
        summary = selection.select(
            store, indexed, DataConfig.model_validate(data), run=InProcess(seed)
        )
        return summary, [list(stored_codes(store, number)[1]) for number in range(len(chunks))]


@settings(max_examples=50)
@given(chunks_of_texts, st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.booleans())
def test_decisions_equal_a_plain_loop_in_any_order(
    chunks: list[list[bytes]], val_fraction: float, dedup: bool
) -> None:
    summary, codes = select(chunks, val_fraction=val_fraction, dedup=dedup)
    seen: set[bytes] = set()
    expected = []
    for texts in chunks:
        expected.append([])
        for text in texts:
            if not text:
                code = DROP_CODES[Drop.EMPTY]
            elif dedup and text in seen:
                code = DROP_CODES[Drop.DUPLICATE]
            else:
                share = int.from_bytes(document_hash(text)[:8], "big") / 2**64
                code = HELD_OUT if share < val_fraction else 0
            seen.add(text)
            expected[-1].append(code)
    flat = list(chain.from_iterable(expected))
    decided = list(chain.from_iterable(codes))
    kept = flat.count(0) + flat.count(HELD_OUT)
    if not (val_fraction and kept and (flat.count(0) == 0 or flat.count(HELD_OUT) == 0)):
        assert codes == expected
    else:  # the exception for small corpora moves the text of the least hash, or of the largest; the only one trains
        moved = {
            texts[place]
            for texts, own in zip(chunks, codes, strict=True)
            for place, code in enumerate(own)
            if code == (0 if flat.count(HELD_OUT) else HELD_OUT)
        }
        kept_texts = {text for texts in chunks for text in texts if text}
        is_moved = len(kept_texts) > 1 or flat.count(HELD_OUT)
        chosen = (max if flat.count(HELD_OUT) else min)(kept_texts, key=document_hash)
        assert moved == ({chosen} if is_moved else set())
        assert len(kept_texts) == 1 or {0, HELD_OUT} <= set(decided)
    assert summary.documents == kept
    assert summary.dropped["empty"] == flat.count(DROP_CODES[Drop.EMPTY])
    assert sum(summary.dropped.values()) + kept == len(flat)
    assert select(chunks, seed=1, val_fraction=val_fraction, dedup=dedup) == (summary, codes)


def test_the_source_hash_is_that_of_the_texts_in_their_order() -> None:
    chunks = [[b"a", b"b"], [b"c"]]
    assert select(chunks)[0].source_hash == select(chunks, seed=5)[0].source_hash
    assert select(chunks)[0].source_hash != select([[b"b", b"a"], [b"c"]])[0].source_hash


def test_near_duplicates_are_dropped_under_their_own_reason() -> None:
    words = [f"word{number}" for number in range(300)]
    text = " ".join(words).encode()
    edited = " ".join([*words[:150], "other", *words[151:]]).encode()
    _, codes = select(
        [[text, b"something else"], [edited, text]], near_dedup_threshold=0.8, val_fraction=0.0
    )
    near, exact = DROP_CODES[Drop.NEAR_DUPLICATE], DROP_CODES[Drop.DUPLICATE]
    assert codes == [[0, 0], [near, exact]]
    assert select([[text], [edited]], val_fraction=0.0)[1] == [[0], [0]]


@pytest.mark.more
def test_the_share_that_is_held_out_is_the_one_asked_for() -> None:
    texts = [b"%d" % number for number in range(20_000)]
    (codes,) = select([texts], val_fraction=0.05)[1]
    assert abs(codes.count(HELD_OUT) / len(texts) - 0.05) < 0.01
    assert select([texts[:2000]], val_fraction=0.0)[1] == [[0] * 2000]


def test_the_only_document_trains() -> None:
    """Also where its hash is among those that validate."""
    texts = [b"%d" % number for number in range(100)]
    for val_fraction in (0.05, 0.5):
        assert {
            codes[0] for text in texts for codes in select([[text]], val_fraction=val_fraction)[1]
        } == {0}


def test_a_capped_validation_split_is_the_part_with_the_least_hashes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So a document that a smaller split holds out is held out by a larger one."""
    texts = [b"%d" % number for number in range(5000)]
    (wide,) = select([texts], val_fraction=0.5)[1]
    assert capsys.readouterr().err.count("holds out") == 0
    summary, (codes,) = select([texts], val_fraction=0.5, val_max_documents=200)
    assert 150 < codes.count(HELD_OUT) < 250
    assert {place for place, code in enumerate(codes) if code} <= {
        place for place, code in enumerate(wide) if code
    }
    assert (
        f"{wide.count(HELD_OUT):,} documents that data.val_fraction holds out"
        in capsys.readouterr().err
    )
    assert summary.documents == 5000
    assert select([texts], val_fraction=0.5, val_max_documents=3000)[1] == [wide]


def test_a_second_run_repeats_nothing(tmp_path: Path) -> None:
    """All that a run stored before it was killed is used; what is gone is made again, with the same
    bytes."""
    store = open_storage(str(tmp_path))
    texts = [
        [b"%d of the texts that differ in one word" % (number % 17) for number in range(n, n + 9)]
        for n in (0, 5, 9)
    ]
    indexed = [index(store, number, own) for number, own in enumerate(texts)]
    config = DataConfig(near_dedup_threshold=0.5, val_fraction=0.3, selection_task_bytes=2000)

    def files() -> dict[Path, tuple[bytes, int]]:
        paths = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    summary = selection.select(store, indexed, config, run=InProcess(0))
    assert summary.dropped["duplicate"] and summary.dropped["near_duplicate"]
    before = files()
    assert selection.select(store, indexed, config, run=InProcess(1)) == summary
    assert files() == before
    for name in (
        "hashes/section-00001",
        "bands/partition-00000",
        "asked/section-00002",
        "asked/partition-00000",
        "links/partition-00001",
        "links-1/partition-00000",
        "settled",
    ):
        for path in [path for path in before if f"index/selection-2000/{name}" in str(path)]:
            path.write_bytes(path.read_bytes()[:-1])  # cut off by a power loss
    assert selection.select(store, indexed, config, run=InProcess(2)) == summary
    assert {path: content for path, (content, _) in files().items()} == {
        p: content for p, (content, _) in before.items()
    }
