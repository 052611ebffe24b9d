"""Chunks: the same whatever the files are called; together they hold each byte range once; none
crosses a source."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.data import DataConfig
from jobs.corpus.chunks import is_divisible, plan_chunks, whole_file
from jobs.corpus.listing import CorpusFile

kinds = st.sampled_from(
    [("txt", ""), ("jsonl", ""), ("jsonl", ".gz"), ("csv", ""), ("parquet", ""), ("txt", ".zst")]
)
DATA = DataConfig(shard_bytes=100, max_document_bytes=150)


@st.composite
def corpora(draw: st.DrawFn) -> list[CorpusFile]:
    files = []
    for number in range(draw(st.integers(1, 12))):
        kind, compression = draw(kinds)
        source = draw(st.integers(files[-1].source, files[-1].source + 1)) if files else 0
        files.append(
            CorpusFile(
                number, f"/f{number}", source, draw(st.integers(0, 500)), "v", kind, compression
            )
        )
    return files


@given(corpora())
def test_each_byte_is_in_one_chunk_of_its_source(files: list[CorpusFile]) -> None:
    pieces = {
        number: [whole_file(replace(file, compression=""))]
        for number, file in enumerate(files)
        if file.size > 100 and not is_divisible(file)
    }
    chunks = plan_chunks(files, pieces, DATA)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    ranges = [(part.file.number, part.start, part.end) for chunk in chunks for part in chunk.parts]
    assert ranges == sorted(ranges)
    for number, file in enumerate(files):
        own = [(start, end) for part, start, end in ranges if part == number]
        assert own[0][0] == 0 and own[-1][1] == file.size
        assert all(before[1] == after[0] for before, after in pairwise(own))
    for chunk in chunks:
        assert {part.file.source for part in chunk.parts} == {chunk.source}
        divided = [
            part
            for part in chunk.parts
            if part.file.kind in ("jsonl", "parquet") and not part.file.compression
        ]
        assert all(
            part.end - part.start <= 100 for part in divided if part.file.number not in pieces
        )
    renamed = [replace(file, uri=f"/elsewhere{file.uri}") for file in files]
    again = plan_chunks(renamed, pieces, DATA)
    assert [[(p.file.number, p.start, p.end) for p in c.parts] for c in again] == [
        [(p.file.number, p.start, p.end) for p in c.parts] for c in chunks
    ]
