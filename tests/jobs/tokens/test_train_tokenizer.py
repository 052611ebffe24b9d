"""The tokenizer stage: same corpus, same tokenizer; trained once, or loaded from where it is
named."""

import gzip
import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.settings.data import DataConfig
from cluster.storage.uris import NotFoundError, open_storage, split_uri
from jobs.corpus.chunks import Part
from jobs.corpus.documents import Document, read_documents
from jobs.corpus.listing import list_corpus
from jobs.tokens.train_tokenizer import ensure_tokenizer, sample_texts
from model.text.tokenizer import train_bpe
from raymill.errors import UserError
from tests.jobs.corpora import data_config, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "texts", num_documents=80)


def test_two_trainings_give_one_tokenizer(ray_workers: int, corpus: Path, tmp_path: Path) -> None:
    config = data_config(str(corpus), tmp_path / "one")
    tokenizer, uri = ensure_tokenizer(config)
    again, other_uri = ensure_tokenizer(data_config(str(corpus), tmp_path / "two"))
    assert uri != other_uri
    assert tokenizer.hash == again.hash == hashlib.sha256(Path(uri).read_bytes()).hexdigest()
    assert tokenizer.vocab_size == 400
    files = list_corpus(str(corpus)).files
    here = train_bpe(sample_texts(files, config.data), vocab_size=400, normalize=())
    assert here.hash == tokenizer.hash


def test_it_is_trained_once_until_what_shapes_it_changes(ray_workers: int, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=40)
    _, uri = ensure_tokenizer(data_config(str(corpus), tmp_path))
    written_ns = Path(uri).stat().st_mtime_ns
    assert ensure_tokenizer(data_config(str(corpus), tmp_path, val_fraction=0.5))[1] == uri
    assert Path(uri).stat().st_mtime_ns == written_ns
    assert ensure_tokenizer(data_config(str(corpus), tmp_path, vocab_size=300))[1] != uri
    (corpus / "a.jsonl").write_text(json.dumps({"text": "other text"}))
    assert ensure_tokenizer(data_config(str(corpus), tmp_path))[1] != uri


def test_a_named_tokenizer_is_loaded(
    ray_workers: int, corpus: Path, tmp_path: Path, s3_bucket: str
) -> None:
    tokenizer, uri = ensure_tokenizer(data_config(str(corpus), tmp_path))
    storage, name = split_uri(uri)
    open_storage(f"s3://{s3_bucket}/given").write_bytes(name, storage.read_bytes(name))
    for given in (
        uri,
        str(Path(uri).parent),
        f"s3://{s3_bucket}/given",
        f"s3://{s3_bucket}/given/tokenizer.json",
    ):
        loaded, loaded_uri = ensure_tokenizer(data_config("unused", tmp_path, tokenizer=given))
        assert loaded.hash == tokenizer.hash
        assert loaded_uri.endswith("tokenizer.json")
    with pytest.raises(NotFoundError, match=r"nowhere.* does not exist; .*data\.tokenizer"):
        ensure_tokenizer(data_config("unused", tmp_path, tokenizer=f"{tmp_path}/nowhere"))


def test_a_tiny_corpus_has_a_smaller_vocabulary(
    ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    tokenizer, _ = ensure_tokenizer(data_config(f"{tmp_path}/a.txt", tmp_path / "storage"))
    assert 257 <= tokenizer.vocab_size < 300
    assert f"its tokenizer has {tokenizer.vocab_size} ids, not 400" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("to be")) == "to be"


def test_a_small_corpus_is_sampled_whole(tmp_path: Path) -> None:
    for number, text in enumerate(["first ", "", "first ", "zweite Ä", "third"]):
        (tmp_path / f"{number}.txt").write_text(text)
    files = list_corpus(str(tmp_path)).files
    assert list(sample_texts(files, DataConfig())) == ["first ", "zweite Ä", "third"]
    assert list(sample_texts(files, DataConfig(dedup=False))) == [
        "first ",
        "first ",
        "zweite Ä",
        "third",
    ]


ALPHABETS = [
    "abcdefgh",
    "ijklmnop",
    "qrstuvwx",
    "ABCDEFGH",
    "IJKLMNOP",
    "QRSTUVWX",
    "äöüéèàçñ",
    "абвгдежз",
]


def write_sorted(folder: Path, kind: str, *, num_documents: int = 1600) -> None:
    """Writes a corpus in which one alphabet follows the other."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    letters = [
        ALPHABETS[number * len(ALPHABETS) // num_documents] for number in range(num_documents)
    ]
    texts = [" ".join("".join(rng.choices(own, k=5)) for _ in range(30)) for own in letters]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    match kind:
        case "jsonl":
            (folder / "a.jsonl").write_text("\n".join(lines))
        case "parquet":
            pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=50)
        case "txt":
            (folder / "a.txt").write_text("\n".join(texts))
        case "files":
            for number, text in enumerate(texts):
                (folder / f"{number:04d}.txt").write_text(text)
        case "archives":
            for number in range(0, num_documents, 100):
                (folder / f"{number:04d}.jsonl.gz").write_bytes(
                    gzip.compress("\n".join(lines[number:][:100]).encode())
                )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "files", "archives"])
def test_the_sample_comes_from_all_over_a_sorted_corpus(kind: str, tmp_path: Path) -> None:
    """The sample has the wanted size, equal shares, and the same text whatever the files are
    called."""
    for name in ("here", "there"):
        write_sorted(tmp_path / name / "texts", kind)
    data = DataConfig(tokenizer_sample_bytes=150_000, max_document_bytes=20_000)
    sample = list(sample_texts(list_corpus(f"{tmp_path}/here").files, data))
    text = "".join(sample)
    assert 0.95 * data.tokenizer_sample_bytes <= len(text.encode()) <= data.tokenizer_sample_bytes
    num_words = [sum(word[:1] in own for word in text.split()) for own in ALPHABETS]
    assert max(num_words) < 2.5 * min(num_words), num_words
    assert sample == list(sample_texts(list_corpus(f"{tmp_path}/there").files, data))


def test_little_of_a_large_corpus_is_read_and_every_document_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0

    def counted(part: Part, data: DataConfig) -> Iterator[Document]:
        nonlocal num_read
        for document in read_documents(part, data):
            num_read += document.size
            yield document

    monkeypatch.setattr("jobs.tokens.train_tokenizer.read_documents", counted)
    write_sorted(tmp_path / "texts", "jsonl", num_documents=20_000)
    files = list_corpus(f"{tmp_path}/texts").files
    list(sample_texts(files, DataConfig(tokenizer_sample_bytes=100_000)))
    assert 100_000 <= num_read < 150_000  # of 4 MB
    texts = [f'{{"text": "{"kept" if number == 5 else ""}"}}' for number in range(100_000)]
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(texts))
    files = list_corpus(f"{tmp_path}/texts").files
    assert list(sample_texts(files, DataConfig(tokenizer_sample_bytes=1000))) == ["kept"]


def test_an_empty_corpus_stops_the_training(ray_workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x00")
    with pytest.raises(
        UserError, match=r"the corpus is empty: 1 file, 1 document dropped \(1 binary\)"
    ):
        ensure_tokenizer(data_config(str(tmp_path), tmp_path / "storage"))


def test_a_word_of_a_megabyte_takes_no_hours(tmp_path: Path) -> None:
    # In one piece this trains for half a minute
    bases = "".join(random.Random(0).choices("ACGT", k=200_000))
    (tmp_path / "a.txt").write_text(bases)
    files = list_corpus(f"{tmp_path}/a.txt").files
    pieces = list(sample_texts(files, DataConfig()))
    assert "".join(pieces) == bases
    started_s = time.process_time()
    assert train_bpe(pieces, vocab_size=1000).vocab_size == 1000
    assert time.process_time() - started_s < 15
