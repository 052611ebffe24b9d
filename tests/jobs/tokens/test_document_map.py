"""The document map: each document's place in the corpus and in the store, the same bytes however it
is made, and what a store without one says."""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.settings.run import RunConfig
from cluster.storage.uris import open_storage
from jobs.corpus.chunks import whole_file
from jobs.corpus.documents import read_documents
from jobs.corpus.listing import list_corpus
from jobs.tokens import build_store, document_map
from jobs.tokens.build_store import tokenize
from jobs.tokens.document_map import (
    DOCUMENTS,
    RECORD,
    DocumentMap,
    MappedDocument,
    NoDocumentMapError,
    check_of,
)
from jobs.tokens.inspect_store import verify
from jobs.tokens.token_store import TOKENIZER, TokenStoreError, read_manifest
from model.text.tokenizer import Tokenizer
from tests.jobs.cleaning.in_process import tokenize_in_process
from tests.jobs.corpora import data_config, make_corpus

MANIFEST_HASH = "8fd1bf5a98da9d4ff57c92a2243868109e148c4c0d12845753dc5796095be924"
"""Of a store that was made before there were maps."""

TABLE_HASH = "e1d2a6a2569ad54807f849fd11715f12f1d0b4b5bf24e584303f9991a0c9d61c"


class KilledError(BaseException):
    pass


@pytest.fixture(autouse=True)
def run_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_in_process(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    corpus = make_corpus(tmp_path / "texts", num_documents=120)
    return data_config(str(corpus), tmp_path / "storage", near_dedup_threshold=0.9)


def folder_of(result: dict[str, Any]) -> Path:
    return Path(result["manifest"]).parent


def opened(result: dict[str, Any]) -> DocumentMap:
    store = open_storage(str(folder_of(result)))
    return DocumentMap(store, read_manifest(store))


def all_documents(mapped: DocumentMap) -> list[MappedDocument]:
    documents = []
    for shard in mapped.manifest.shards:
        if in_shard := mapped.documents_of(shard.file):
            documents += [in_shard.document(number) for number in range(len(in_shard))]
    return documents


def tokens_of(mapped: DocumentMap, document: MappedDocument) -> np.ndarray:
    content = mapped.store.read_bytes(document.shard.file)
    return np.frombuffer(content, mapped.manifest.dtype)[document.start : document.end]


def map_bytes(folder: Path) -> dict[str, bytes]:
    """Returns the files of a map, by name."""
    return {path.name: path.read_bytes() for path in [*folder.glob("*.docs"), folder / DOCUMENTS]}


def without_map(folder: Path) -> None:
    for name in map_bytes(folder):
        (folder / name).unlink()


def mapping(config: RunConfig) -> RunConfig:
    data = config.data.model_copy(update={"map_documents": True})
    return config.model_copy(update={"data": data})


def tokenize_until_killed(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the last pass after three chunks."""
    written = build_store._written

    def killed(*arguments: Any) -> Any:
        results = written(*arguments)
        yield from (next(results) for _ in range(3))
        raise KilledError

    with monkeypatch.context() as killing, pytest.raises(KilledError):
        killing.setattr(build_store, "_written", killed)
        tokenize(config)


def write_long_files(folder: Path) -> None:
    """Adds files that are cut: a table, the same as an archive, and a text."""
    rows = "".join(f'{n},"row ""{n}"" \n{n * n} {"word " * 20}{n}"\n' for n in range(400))
    (folder / "f.csv").write_text(f"number,text\n{rows}")
    archived = rows.replace("row", "line").encode()
    (folder / "g.csv.gz").write_bytes(gzip.compress(b"number,text\n" + archived, 0))
    (folder / "h.txt").write_text("\n".join(f"a long text, part {n} of it" for n in range(3000)))


def test_each_document_lies_where_the_map_says(config: RunConfig) -> None:
    write_long_files(Path(config.data.source[0]))
    settings = {"max_document_bytes": 20_000, "near_dedup_threshold": None}
    config = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    mapped = opened(tokenize(config))
    files = list_corpus(config.data.source).files
    texts = {
        (file.number, document.offset): document.text
        for file in files
        for document in read_documents(whole_file(file), config.data)
    }
    tokenizer = Tokenizer.from_json(mapped.store.read_bytes(TOKENIZER))
    documents = all_documents(mapped)
    assert len(documents) == mapped.manifest.total("documents") > 900
    assert len({document.shard.file for document in documents}) > 5
    for document in documents:
        ids = tokens_of(mapped, document)
        assert tokenizer.decode(ids[:-1].tolist()) == texts[document.file, document.place]
        assert (ids == mapped.manifest.eot_id).tolist() == [False] * (len(ids) - 1) + [True]
    assert mapped.files == [(file.uri, file.size, file.version) for file in files]


def test_documents_are_found_by_token_by_place_and_by_check(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_map, "_BLOCK_RECORDS", 3)
    monkeypatch.setattr(document_map, "_OPEN_BLOCKS", 2)
    monkeypatch.setattr(document_map, "_SCANNED_RECORDS", 4)
    mapped = opened(tokenize(config))
    for shard in mapped.manifest.shards:
        documents = mapped.documents_of(shard.file)
        assert documents is not None
        for number in range(len(documents)):
            document = documents.document(number)
            for token in (document.start, document.end - 1):
                assert documents.number_at(token) == number
            assert documents.number_from(document.file, document.place) == number
            assert documents.number_from(document.file, document.place + 1) == number + 1
            check = check_of(tokens_of(mapped, document).tobytes())
            assert [*documents.with_check(check, tokens=document.tokens)] == [document]
            assert not [*documents.with_check(check, tokens=document.tokens + 1)]


def test_the_map_leaves_the_manifest_and_the_key_as_they_were(tmp_path: Path) -> None:
    """Runs know their store by these."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    lines = [json.dumps({"text": f"text number {number} " * 9}) for number in range(40)]
    (corpus / "a.jsonl").write_text("\n".join(lines))
    config = data_config(str(corpus), tmp_path / "storage", vocab_size=270)
    result = tokenize(config)
    assert result["manifest_hash"] == MANIFEST_HASH
    before = {path: path.stat().st_mtime_ns for path in folder_of(result).iterdir()}
    assert tokenize(mapping(config)) == result
    assert {path: path.stat().st_mtime_ns for path in folder_of(result).iterdir()} == before
    assert result["document_map"]
    assert RECORD.itemsize == 24
    table = (folder_of(result) / "shard-00000.docs").read_bytes()
    assert len(table) % 24 == 0
    assert hashlib.sha256(table).hexdigest() == TABLE_HASH


def test_a_store_without_a_map_gets_the_same_one(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokenize(config)
    folder = folder_of(made)
    expected = map_bytes(folder)
    without_map(folder)
    others = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(NoDocumentMapError, match="has no document map"):
        opened(made)
    assert tokenize(config) == made | {"document_map": False}, "it is used as it is"

    # A kill in the middle: the second launch goes on, and writes no table twice
    tokenize_until_killed(mapping(config), monkeypatch)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.docs")}
    assert kept
    assert len(kept) < len(expected) - 1
    assert tokenize(mapping(config)) == made
    assert map_bytes(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in others} == others, "no shard was touched"
    assert not [path for path in folder.rglob("mapping/*") if path.is_file()]


def test_a_store_that_was_begun_before_there_were_maps_is_finished_with_one(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = tokenize(config)
    elsewhere = config.storage.model_copy(update={"uri": str(tmp_path / "begun")})
    begun = config.model_copy(update={"storage": elsewhere})
    tokenize_until_killed(begun, monkeypatch)
    (folder,) = (tmp_path / "begun" / "tokens").iterdir()
    for sidecar in folder.glob("shard-*.json"):
        values = json.loads(sidecar.read_bytes())
        del values["result"]["tables"]
        sidecar.write_text(json.dumps(values))
    for table in folder.glob("*.docs"):
        table.unlink()
    finished = tokenize(begun)
    assert finished["manifest_hash"] == made["manifest_hash"]
    assert map_bytes(folder) == map_bytes(folder_of(made))


def test_a_map_is_not_made_from_other_texts(config: RunConfig) -> None:
    made = tokenize(config)
    without_map(folder_of(made))
    (corpus,) = config.data.source
    file = Path(corpus) / "a.jsonl"
    before = file.stat()
    content = file.read_bytes()
    file.write_bytes(content.replace(b"e", b"o"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    differing = r"does not make the shards .* again, the first that differs is shard-00000\.bin"
    with pytest.raises(TokenStoreError, match=differing):
        tokenize(mapping(config))
    assert not (folder_of(made) / DOCUMENTS).exists()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokenize(mapping(config)) == made


def test_a_copied_store_brings_its_map(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "z.txt").write_text("one more text " * 30)
    first = tokenize(config)
    source = folder_of(first)
    settings = {"tokenizer": str(source / TOKENIZER), "weights": [1, 1]}
    sources = [str(tmp_path / "more"), f"tokens://{source}"]
    mixed = data_config(sources, tmp_path / "mixed", **settings)
    mapped, copied = opened(tokenize(mixed)), opened(first)
    assert not mapped.unmapped
    origins = {mapped.files[document.file][0] for document in all_documents(mapped)}
    assert str(tmp_path / "more" / "z.txt") in origins
    assert {
        (mapped.files[document.file], document.place, document.tokens)
        for document in all_documents(mapped)
        if document.shard.source == 1
    } == {
        (copied.files[document.file], document.place, document.tokens)
        for document in all_documents(copied)
    }
    assert verify(mapped.store)["document_tables"] == len(mapped.manifest.shards)

    brought = map_bytes(source)
    without_map(source)
    shutil.rmtree(tmp_path / "mixed" / "tokens")
    partly = opened(tokenize(mixed))
    assert {shard.source for shard in partly.unmapped} == {1}
    assert [document.shard.source for document in all_documents(partly)] == [0]
    for name, content in brought.items():
        (source / name).write_bytes(content)
    assert all_documents(opened(tokenize(mapping(mixed)))) == all_documents(mapped)


def test_verify_names_an_altered_table_and_a_strange_list(config: RunConfig) -> None:
    result = tokenize(config)
    folder = folder_of(result)
    store = open_storage(str(folder))
    assert verify(store)["document_tables"] == len(result["shards"])
    table = folder / "shard-00001.docs"
    content = table.read_bytes()
    table.write_bytes(content[:8] + b"\1" + content[9:])
    with pytest.raises(TokenStoreError, match=r"shard-00001\.docs is missing or altered"):
        verify(store)
    table.unlink()
    with pytest.raises(TokenStoreError, match=r"shard-00001\.docs is missing or altered"):
        verify(store)
    assert tokenize(mapping(config)) == result
    assert table.read_bytes() == content

    listed = json.loads((folder / DOCUMENTS).read_bytes())
    (folder / DOCUMENTS).write_text(json.dumps(listed | {"manifest_hash": "0" * 64}))
    with pytest.raises(TokenStoreError, match="belongs to another manifest"):
        verify(store)
    (folder / DOCUMENTS).write_text("{")
    with pytest.raises(TokenStoreError, match=r"documents\.json is missing or damaged"):
        verify(store)
    without_map(folder)
    assert verify(store)["document_tables"] == 0
