"""Contamination: what shares a run of words with a validation document, by brute force and through
the filter."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage, open_storage
from jobs.cleaning import decontamination
from jobs.cleaning.decontamination import ValidationNgrams, decontaminate
from jobs.cleaning.exchange import Exchange, Section
from jobs.cleaning.selection import HELD_OUT, store_codes, stored_codes
from jobs.cleaning.why_dropped import DROP_CODES
from jobs.corpus.chunks import Chunk, whole_file
from jobs.corpus.documents import Drop
from jobs.corpus.listing import list_corpus
from tests.jobs.cleaning.in_process import WHOLE, InProcess

CONTAMINATED = DROP_CODES[Drop.CONTAMINATED]
DUPLICATE = DROP_CODES[Drop.DUPLICATE]
SIZE = 4


def made_texts(count: int, rng: random.Random) -> list[str]:
    """Texts of few words, which share runs of four here and there."""
    words = [f"w{number}" for number in range(12)]
    return [" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in range(count)]


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return (
        {tuple(words[place : place + SIZE]) for place in range(max(1, len(words) - SIZE + 1))}
        if words
        else set()
    )


def decided(
    texts: list[str],
    codes: list[int],
    folder: Path,
    store: Storage,
    *,
    seed: int = 0,
    task_bytes: int = WHOLE,
) -> list[int]:
    """Returns the codes after decontamination, having checked that a second call changes
    nothing."""
    chunks = chunks_of(texts, folder)
    data = DataConfig(decontaminate_ngram=SIZE, selection_task_bytes=task_bytes)
    for chunk in chunks:
        store_codes(
            store,
            chunk.number,
            bytes(32).hex(),
            bytes(codes[20 * chunk.number : 20 * chunk.number + 20]),
        )
    found = [decontaminate(store, chunks, data, run=InProcess(seed + again)) for again in (0, 1)]
    after = [code for chunk in chunks for code in stored_codes(store, chunk.number)[1]]
    assert found == [after.count(CONTAMINATED)] * 2
    return after


def chunks_of(texts: list[str], folder: Path) -> list[Chunk]:
    """Writes a file, and so a chunk, for every 20 texts."""
    folder.mkdir()
    for start in range(0, len(texts), 20):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[start : start + 20]]
        (folder / f"{start:04d}.jsonl").write_text("".join(lines))
    return [Chunk(file.number, 0, [whole_file(file)]) for file in list_corpus(str(folder)).files]


@pytest.mark.parametrize("task_bytes", [300, WHOLE])
@pytest.mark.parametrize("most_filter_bytes", [1, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_what_shares_a_run_with_a_validation_document_is_contaminated(
    seed: int,
    most_filter_bytes: int,
    task_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with a filter so full that it lets everything pass."""
    monkeypatch.setattr(decontamination, "_MOST_FILTER_BYTES", most_filter_bytes)
    rng = random.Random(seed)
    texts = made_texts(150, rng)
    codes = rng.choices([0, HELD_OUT, DUPLICATE], [90, 4, 6], k=len(texts))
    held_out = set().union(
        *(runs_of(text) for text, code in zip(texts, codes, strict=True) if code == HELD_OUT)
    )
    expected = [
        CONTAMINATED if code == 0 and runs_of(text) & held_out else code
        for text, code in zip(texts, codes, strict=True)
    ]
    assert expected.count(CONTAMINATED) > 3 and expected.count(0) > 3
    store = open_storage(f"{tmp_path}/store")
    assert (
        decided(texts, codes, tmp_path / "texts", store, seed=seed, task_bytes=task_bytes)
        == expected
    )
    folder = f"index/selection-{task_bytes}"
    filters, partitions = (
        len(store.list(f"{folder}/{name}")) for name in ("held-out/filter", "training/partition")
    )
    if task_bytes == WHOLE:
        assert (filters, partitions) == (1, 1)
    else:  # more of them where more n-grams pass
        assert filters > 1 and partitions == filters * (partitions // filters)
        assert (partitions > filters) == (most_filter_bytes == 1)


def test_without_validation_documents_nothing_is_read_twice(tmp_path: Path) -> None:
    texts = made_texts(40, random.Random(0))
    assert (
        decided(texts, [0] * 40, tmp_path / "texts", open_storage(f"{tmp_path}/store")) == [0] * 40
    )
    assert not open_storage(f"{tmp_path}/store").list(f"index/selection-{WHOLE}/training")


def test_the_filter_knows_all_that_is_held_and_little_else(tmp_path: Path, s3_bucket: str) -> None:
    """On any storage; 16 bits for each n-gram let about one of 16 others pass."""
    rng = np.random.default_rng(0)
    held, others = (rng.integers(0, 2**64, size, dtype=np.uint64) for size in (20_000, 100_000))
    for store in (open_storage(str(tmp_path)), open_storage(f"s3://{s3_bucket}/filter")):
        sent = Exchange(store, "index/held-out", 2, 3)
        records = np.zeros(len(held), decontamination._NGRAM)
        records["hash"] = held
        for section, own in enumerate((records[:5000], records[5000:])):
            pieces = [own[own["hash"] % np.uint64(3) == part].tobytes() for part in range(3)]
            sent.send(
                Section(section, range(0)),
                pieces=lambda section, exchange, pieces=pieces: iter([[piece] for piece in pieces]),
            )
        known = ValidationNgrams(sent, filter_bytes=2 * len(held) // 3)
        for partition in range(3):
            known.store_filter(partition)
        assert known.may_hold(held).all()
        assert 0.05 < known.may_hold(others).mean() < 0.07
