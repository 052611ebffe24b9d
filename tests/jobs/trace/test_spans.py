"""The spans that are found are those that a search of every place finds."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.division import whole
from jobs.tokens.token_store import MANIFEST, Manifest, Shard, read_manifest, token_dtype
from jobs.trace.build_index import index_store
from jobs.trace.spans import MOST_TEXT_TOKENS, SearchedStore, Span, find_spans
from jobs.trace.trace_index import TRACE, TraceIndex
from jobs.trace.windows import LEAST_SPAN
from raymill.errors import UserError
from tests.jobs.cleaning.in_process import MEMORY, InProcess
from tests.jobs.stores import manifest_of
from tests.waiting import wait_until

VOCAB_SIZE = 1000
EOT = VOCAB_SIZE - 1

Ids = list[int]


def store_of(storage: Storage, shards: Sequence[Ids]) -> Manifest:
    """Stores shards of these tokens, of which the last one is held out."""
    listed = []
    for number, tokens in enumerate(shards):
        content = np.array(tokens, token_dtype(VOCAB_SIZE)).tobytes()
        split = "val" if number + 1 == len(shards) else "train"
        digest = hashlib.sha256(content).hexdigest()
        name = f"shard-{number:05d}.bin"
        storage.write_bytes(name, content)
        listed.append(Shard(name, split, 0, len(tokens), 1, len(content), digest))  # type: ignore[arg-type]
    manifest = manifest_of(listed, vocab_size=VOCAB_SIZE)
    storage.write_bytes(MANIFEST, manifest.to_json())
    return manifest


def spans_of(storage: Storage, text: Ids, *, min_tokens: int = LEAST_SPAN) -> list[Span]:
    manifest = read_manifest(storage)
    trained = whole([shard for shard in manifest.shards if shard.split == "train"])
    searched = SearchedStore(storage, manifest, trained)
    index = TraceIndex(storage, manifest)
    return find_spans(np.array(text, np.uint64), index, searched, min_tokens=min_tokens)


def common(text: Ids, tokens: Ids) -> int:
    """Returns how many first tokens are equal, up to the end of a document."""
    length = 0
    for ours, theirs in zip(text, tokens, strict=False):
        if ours != theirs or ours == EOT:
            break
        length += 1
    return length


def brute_force(
    shards: Sequence[Ids], text: Ids, *, min_tokens: int
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Returns each maximal span with the shards and tokens where it stands, by trying all."""
    spans: list[tuple[int, int]] = []
    for start in range(len(text)):
        longest = 0
        for tokens in shards[:-1]:
            for first in range(len(tokens)):
                longest = max(longest, common(text[start:], tokens[first:]))
        if longest >= min_tokens and not (spans and spans[-1][1] >= start + longest):
            spans.append((start, start + longest))
    result = {}
    for start, end in spans:
        wanted = text[start:end]
        result[start, end] = [
            (number, first)
            for number, tokens in enumerate(shards[:-1])
            for first in range(len(tokens))
            if tokens[first : first + len(wanted)] == wanted
        ]
    return result


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Ids], Ids, int]:
    """Draws shards of documents, a text that quotes some of them, and the shortest span."""
    alphabet = draw(st.sampled_from([1, 2, 3, 20]))
    token = st.integers(0, alphabet - 1)
    document = st.lists(token, min_size=0, max_size=60)
    shards = []
    for _ in range(draw(st.integers(2, 4))):
        documents = draw(st.lists(document, min_size=1, max_size=4))
        shards.append([t for tokens in documents for t in [*tokens, EOT]])
    text: Ids = []
    for _ in range(draw(st.integers(1, 5))):
        quoted = draw(st.sampled_from(shards))
        first = draw(st.integers(0, len(quoted) - 1))
        text += quoted[first : first + draw(st.integers(1, 50))]
        text += draw(st.lists(token, max_size=3))
    for place in draw(st.lists(st.integers(0, len(text) - 1), max_size=3)):
        text[place] = draw(token)
    return shards, text, draw(st.integers(LEAST_SPAN, LEAST_SPAN + 4))


@pytest.mark.more
@given(corpora())
@settings(max_examples=120, deadline=None)
def test_all_maximal_spans_are_found_and_no_others(drawn: tuple[list[Ids], Ids, int]) -> None:
    shards, text, min_tokens = drawn
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        storage = open_storage(folder)
        manifest = store_of(storage, shards)
        index_store(storage, run=InProcess())
        if len(text) < min_tokens:
            with pytest.raises(UserError, match="give more of the text"):
                spans_of(storage, text, min_tokens=min_tokens)
            return
        spans = spans_of(storage, text, min_tokens=min_tokens)
    numbers = {shard.file: number for number, shard in enumerate(manifest.shards)}
    result = {}
    for span in spans:
        assert span.at_most is None
        assert {piece.end - piece.start for piece in span.pieces} == {span.end - span.start}
        places = [(numbers[piece.shard.file], piece.start) for piece in span.pieces]
        result[span.start, span.end] = places
    assert result == brute_force(shards, text, min_tokens=min_tokens)


def test_a_span_longer_than_what_is_read_at_once_is_whole(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    rng = np.random.default_rng(0)
    tokens = [*rng.integers(0, 900, 5000).tolist(), EOT]
    store_of(storage, [tokens, [1, EOT]])
    index_store(storage, run=InProcess())
    text = [950, *tokens[100:4900], 951]
    (span,) = spans_of(storage, text)
    assert (span.start, span.end) == (1, 4801)
    assert [(piece.start, piece.end) for piece in span.pieces] == [(100, 4900)]


def test_a_text_with_one_other_token_has_the_spans_on_its_two_sides(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 900, 60).tolist()
    store_of(storage, [[*tokens, EOT], [1, EOT]])
    index_store(storage, run=InProcess())
    for other in (12, 25, 40, 47):
        text = [*tokens[:other], 950, *tokens[other + 1 :]]
        spans = [(span.start, span.end) for span in spans_of(storage, text)]
        assert spans == [(0, other), (other + 1, 60)]


def test_spans_in_a_bucket_are_those_on_a_disk(tmp_path: object, s3_bucket: str) -> None:
    rng = np.random.default_rng(1)
    shards = [[*rng.integers(0, 900, 3000).tolist(), EOT] for _ in range(3)]
    text = [*shards[0][100:400], *shards[1][7:30], 3, *shards[0][2900:3001], *shards[2][:50]]
    answers = []
    for uri in (str(tmp_path), f"s3://{s3_bucket}/store"):
        storage = open_storage(uri)
        store_of(storage, shards)
        index_store(storage, run=InProcess())
        answers.append(spans_of(storage, text))
    assert answers[0] == answers[1]
    assert [(span.start, span.end) for span in answers[0]] == [(0, 300), (300, 323), (324, 424)]


def test_an_index_in_a_bucket_is_mapped_once_it_is_near(tmp_path: Path, s3_bucket: str) -> None:
    tokens = np.random.default_rng(2).integers(0, 900, 3000).tolist()
    storage = open_storage(f"s3://{s3_bucket}/store")
    manifest = store_of(storage, [[*tokens, EOT], [1, EOT]])
    index_store(storage, run=InProcess())
    text = np.array(tokens[100:400], np.uint64)
    searched = SearchedStore(storage, manifest, whole([manifest.shards[0]]))
    index = TraceIndex(
        storage, manifest, near=FileCache(storage, tmp_path / "near", max_bytes=1 << 20)
    )
    expected = find_spans(text, index, searched)
    assert [(span.start, span.end) for span in expected] == [(0, 300)]
    index.bring_near()
    [part] = index.listed.parts
    wait_until((tmp_path / "near" / part.sha256).exists)
    storage.delete(f"{TRACE}/{part.file}")
    assert find_spans(text, index, searched) == expected


def test_a_text_that_is_too_long_is_refused(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    store_of(storage, [[*range(20), EOT], [1, EOT]])
    index_store(storage, run=InProcess())
    with pytest.raises(UserError, match=r"has 32,769 tokens, and at most 32,768 are .*; divide it"):
        spans_of(storage, [1] * (MOST_TEXT_TOKENS + 1))
    assert not spans_of(storage, [1] * MOST_TEXT_TOKENS)


def test_what_stands_very_often_is_counted_and_its_first_places_are_known(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    phrase = [*range(20), EOT]
    num_often = 20_000
    store_of(storage, [phrase * num_often, [*range(100, 120), EOT], [1, EOT]])
    index_store(storage, run=InProcess())
    often, once = spans_of(storage, [*range(20), 500, *range(100, 120)])
    assert (often.at_most, once.at_most) == (num_often, None)
    assert [piece.start for piece in often.pieces] == [21 * n for n in range(len(often.pieces))]
    assert 1000 <= len(often.pieces) < num_often
    assert len(once.pieces) == 1
