"""Near-duplicates: unbiased estimates, planted copies of every kind found, unrelated documents left
alone."""

import ast
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.uris import open_storage
from jobs.cleaning import deduplication, disk_buckets, duplicates, exchange
from jobs.cleaning.duplicates import BANDED, NGRAM_WORDS, bands_for, least_estimate, similarity
from jobs.cleaning.exchange import Exchange
from jobs.corpus.text_hashes import normalized, word_ngrams
from tests.jobs.cleaning.in_process import MEMORY, WHOLE, InProcess, near_duplicates, signature

PROSE = [re.sub(r"\s+", " ", part) for text in topics.values() for part in text.split("\n\n")]
SENTENCES = [
    part for text in PROSE for part in re.split(r"(?<=[.:]) ", text) if part.count(" ") > 5
]


def ngrams_of(text: str) -> np.ndarray:
    return word_ngrams(normalized(text), NGRAM_WORDS)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    shared = len(np.intersect1d(left, right))
    return shared / (len(np.unique(left)) + len(np.unique(right)) - shared)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_estimate_is_unbiased_and_as_narrow_as_stated(
    shared: int, left: int, right: int, seed: int
) -> None:
    union = shared + left + right
    if not (shared + left and shared + right):
        return
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(200):
        hashes = rng.integers(0, 2**64, union, dtype=np.uint64)
        pair = (
            signature(hashes[: shared + left]),
            signature(np.append(hashes[:shared], hashes[shared + left :])),
        )
        estimates.append(float(similarity(*pair)))
    expected = shared / union
    # Bins that got no hash borrow another's: with fewer hashes than bins the estimate is less
    # narrow.
    deviation = (1.3 if union >= 128 else 2.0) * (expected * (1 - expected) / 128) ** 0.5
    assert abs(np.mean(estimates) - expected) <= 5 * deviation / 200**0.5 + 2e-4
    assert np.std(estimates) <= deviation + 2e-3


def test_a_signature_depends_on_the_set_alone() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 500, dtype=np.uint64)
    assert np.array_equal(signature(hashes), signature(rng.permutation(np.tile(hashes, 3))))
    assert not signature(hashes[:0]).any()


def test_short_documents_are_alike_only_if_they_are_equal(tmp_path: Path) -> None:
    """Three words are one n-gram; 16 bits of it alone would confuse many of 3,000 documents."""
    texts = [f"number {number} only" for number in range(3000)] + ["Number 5 ONLY"]
    signatures = np.array([signature(ngrams_of(text)) for text in texts])
    assert near_duplicates(tmp_path, [signatures], threshold=0.6) == [3000]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold_and_few_far_below(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.98
    assert 1 - (1 - (threshold / 4) ** rows) ** bands < 1 / 3


def replace_words(text: str, rng: random.Random) -> str:
    share = rng.uniform(0.02, 0.05)
    return " ".join(
        rng.choice(["lorem", "ipsum", "dolor"]) if rng.random() < share else w for w in text.split()
    )


def add_sentence(text: str, rng: random.Random) -> str:
    parts = text.split(". ")
    parts.insert(
        rng.randrange(len(parts) + 1),
        "Here somebody put one more sentence into what was written before",
    )
    return ". ".join(parts)


def remove_sentence(text: str, rng: random.Random) -> str:
    parts = text.split(". ")
    del parts[rng.randrange(len(parts))]
    return ". ".join(parts)


def add_frame(text: str, rng: random.Random) -> str:
    return f"Home | News | About us | Log in\n\n{text}\n\nCopyright {rng.randint(1990, 2030)}, all rights reserved."


def change_punctuation(text: str, rng: random.Random) -> str:
    return re.sub(
        r"[.,]", lambda match: match[0] if rng.random() < 0.75 else rng.choice(["", ";", "!"]), text
    )


KINDS = [replace_words, add_sentence, remove_sentence, add_frame, change_punctuation]


def unrelated_documents(count: int, *, seed: int) -> list[str]:
    """Words of English drawn by their frequency, in sentences."""
    rng = random.Random(seed)
    words, counts = zip(*Counter(" ".join(PROSE).split()).items(), strict=True)
    borders = list(accumulate(counts))
    documents = []
    for _ in range(count):
        sentences = [
            " ".join(rng.choices(words, cum_weights=borders, k=rng.randint(8, 25)))
            for _ in range(rng.randint(5, 25))
        ]
        documents.append(". ".join(sentences))
    return documents


def docstrings() -> list[str]:
    """Long docstrings of the standard library, each text once."""
    found = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if text.count(" ") > 60:
                    found[normalized(text)] = text
    return list(found.values())


Corpus = tuple[list[np.ndarray], list[tuple[int, int]], list[float]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """N-grams of documents, then of changed copies of the first ones; (original, copy) of each
    planted pair; and how like an earlier one each document is that is no copy: the standard library
    repeats some docstrings, nearly."""
    texts = [*unrelated_documents(1000, seed=0), *docstrings()]
    num_unrelated = len(texts)
    rng = random.Random(1)
    pairs = [(place, num_unrelated + place) for place in range(600)]
    texts += [KINDS[place % len(KINDS)](texts[place], rng) for place, _ in pairs]
    sets = [ngrams_of(text) for text in texts]
    return sets, pairs, highest_similarities(sets[:num_unrelated])


def highest_similarities(sets: list[np.ndarray]) -> list[float]:
    holders: dict[int, list[int]] = {}
    highest = []
    for place, ngrams in enumerate(sets):
        shared = Counter(
            earlier for ngram in set(ngrams.tolist()) for earlier in holders.get(ngram, [])
        )
        highest.append(
            max(
                (jaccard(ngrams, sets[earlier]) for earlier, _ in shared.most_common(5)),
                default=0.0,
            )
        )
        for ngram in set(ngrams.tolist()):
            holders.setdefault(ngram, []).append(place)
    return highest


@pytest.mark.more
@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.8])
def test_planted_copies_are_found_and_unrelated_documents_stay(
    threshold: float, corpus: Corpus, tmp_path: Path
) -> None:
    sets, pairs, highest = corpus
    signatures = np.array([signature(ngrams) for ngrams in sets])
    dropped = set(near_duplicates(tmp_path, np.array_split(signatures, 5), threshold=threshold))
    similar = {copy: jaccard(sets[original], sets[copy]) for original, copy in pairs}
    for kind, name in enumerate(KINDS):
        due = [
            copy
            for original, copy in pairs
            if original % len(KINDS) == kind and similar[copy] >= threshold
        ]
        assert len(due) >= 20, name
        assert len(dropped.intersection(due)) >= 0.95 * len(due), name
    unrelated = [
        place
        for place, similarity_before in enumerate(highest)
        if similarity_before < threshold / 2
    ]
    assert len(unrelated) > 1400
    assert len(dropped.intersection(unrelated)) <= 0.01 * len(unrelated)


def versions(count: int, rng: random.Random) -> list[str]:
    """Chains of texts, each a change of an earlier one or new."""
    texts = [" ".join(rng.sample(SENTENCES, 6))]
    while len(texts) < count:
        texts.append(
            add_sentence(rng.choice(texts), rng)
            if rng.random() < 0.7
            else " ".join(rng.sample(SENTENCES, 6))
        )
    return texts


def expected_drops(signatures: np.ndarray, threshold: float, *, window: int) -> list[int]:
    """Compares each document with those before it that share a band, `window` of them for each
    band, and keeps the first of those that similar pairs connect."""
    bands, rows = bands_for(threshold)
    cut = signatures[:, : bands * rows].reshape(len(signatures), bands, rows)
    family_of = list(range(len(signatures)))
    for later in range(len(signatures)):
        shares = (cut[later] == cut[:later]).all(axis=2)  # (earlier, bands)
        for place in {
            place for band in shares.T for place in np.flatnonzero(band)[-window:].tolist()
        }:
            if similarity(signatures[later], signatures[place]) >= least_estimate(threshold):
                joined = family_of[later], family_of[place]
                family_of = [min(joined) if family in joined else family for family in family_of]
    return [place for place, family in enumerate(family_of) if family != place]


CUTS = st.lists(st.integers(0, 60), max_size=8).map(lambda borders: [0, *sorted(borders), 60])


@pytest.mark.more
@given(
    seed=st.integers(0, 2**32),
    threshold=st.sampled_from([0.3, 0.6, 0.8, 1.0]),
    cuts=CUTS,
    window=st.sampled_from([1, 2, 5, 64]),
    crowd=st.booleans(),
    sizes=st.tuples(st.sampled_from([1, 2000, 1 << 20]), st.sampled_from([1, 7, 8192])),
    splits=st.tuples(st.sampled_from([1, 15, 100]), st.sampled_from([3000, 20_000, WHOLE])),
)
@settings(max_examples=30, deadline=None)
def test_of_those_that_similar_pairs_connect_the_first_is_kept(
    seed: int,
    threshold: float,
    cuts: list[int],
    window: int,
    crowd: bool,
    sizes: tuple[int, int],
    splits: tuple[int, int],
) -> None:
    """A brute-force comparison decides the same, however the corpus is cut into chunks, sections
    and partitions."""
    signatures = np.array(
        [signature(ngrams_of(text)) for text in versions(60, random.Random(seed))]
    )
    if crowd:
        signatures[:, : bands_for(threshold)[1]] = 7  # all meet in the first band
    with TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_WINDOW", window)
        patch.setattr(disk_buckets, "_BUFFER_BYTES", sizes[0])
        patch.setattr(duplicates, "_BLOCK", sizes[1])
        patch.setattr(deduplication, "_BLOCK", sizes[1])
        patch.setattr(exchange, "_SLICE_BYTES", sizes[0] + 300)
        parts = [signatures[start:end] for start, end in pairwise(cuts)]
        options = {
            "threshold": threshold,
            "run": InProcess(seed),
            "least": splits[0],
            "task_bytes": splits[1],
        }
        found = near_duplicates(Path(folder), parts, **options)
    assert found == expected_drops(signatures, threshold, window=window)


@pytest.mark.parametrize("num_chunks", [1, 6])
def test_work_in_a_crowd_is_bounded_and_a_chain_is_followed(
    num_chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents that share a header: each is compared with at most 64 earlier ones a band, in its
    section and then beyond it. Copies beside each other are found."""
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**16, (600, 128), dtype=np.uint16)
    bands, rows = bands_for(0.7)
    signatures[:, :rows] = 7  # all meet in the first band
    signatures[400] = signatures[399]  # in different sections, if there are several
    compared: list[int] = []
    compare: Callable[..., np.ndarray] = duplicates.similarity
    monkeypatch.setattr(
        duplicates, "similarity", lambda a, b: (compared.append(len(a)), compare(a, b))[1]
    )
    assert near_duplicates(tmp_path, np.array_split(signatures, num_chunks), threshold=0.7) == [400]
    assert 600 * 60 < sum(compared) <= 600 * 64 + bands


def test_a_section_sends_no_more_of_a_crowd_than_a_window_sees(tmp_path: Path) -> None:
    """So no partition grows with the documents that share a header."""
    crowd = np.tile(np.arange(128, dtype=np.uint16), (500, 1))
    assert near_duplicates(tmp_path, [crowd, crowd], threshold=0.7) == list(range(1, 1000))
    sent = Exchange(open_storage(str(tmp_path)), f"index/selection-{WHOLE}/bands", 2, 1).received(
        0, BANDED
    )
    assert list(map(len, sent)) == [128 * bands_for(0.7)[0]] * 2
