"""The tokenizer stage: same corpus, same tokenizer; trained once, or loaded from where it is named."""

import hashlib
import json
import random
import time
from pathlib import Path

import pytest

from cluster.config import DataConfig
from cluster.storage import NotFoundError, open_storage, split_uri
from jobs.corpus_listing import CorpusError, list_corpus
from jobs.train_tokenizer import ensure_tokenizer, run, sample_texts
from model.tokenizer import train_bpe
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
    assert run(data_config(str(corpus), tmp_path))["tokenizer"] == uri
    (corpus / "a.jsonl").write_text(json.dumps({"text": "other text"}))
    assert ensure_tokenizer(data_config(str(corpus), tmp_path))[1] != uri


def test_a_named_tokenizer_is_loaded(ray_workers: int, corpus: Path, tmp_path: Path, s3_bucket: str) -> None:
    tokenizer, uri = ensure_tokenizer(data_config(str(corpus), tmp_path))
    storage, name = split_uri(uri)
    open_storage(f"s3://{s3_bucket}/given").write_bytes(name, storage.read_bytes(name))
    for given in (uri, str(Path(uri).parent), f"s3://{s3_bucket}/given", f"s3://{s3_bucket}/given/tokenizer.json"):
        loaded, loaded_uri = ensure_tokenizer(data_config("unused", tmp_path, tokenizer=given))
        assert loaded.hash == tokenizer.hash
        assert loaded_uri.endswith("tokenizer.json")
    with pytest.raises(NotFoundError, match=r"data\.tokenizer='.*nowhere': .* does not exist"):
        ensure_tokenizer(data_config("unused", tmp_path, tokenizer=f"{tmp_path}/nowhere"))


def test_a_tiny_corpus_has_a_smaller_vocabulary(
    ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    tokenizer, _ = ensure_tokenizer(data_config(f"{tmp_path}/a.txt", tmp_path / "storage"))
    assert 257 <= tokenizer.vocab_size < 300
    assert f"its tokenizer has {tokenizer.vocab_size} ids, not 400" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("to be")) == "to be"


def test_the_sample_is_the_front_of_the_kept_text(tmp_path: Path) -> None:
    for number, text in enumerate(["first ", "", "first ", "zweite Ä", "third"]):
        (tmp_path / f"{number}.txt").write_text(text)
    files = list_corpus(str(tmp_path)).files

    def sample(num_bytes: int, *, dedup: bool = True) -> list[str]:
        return list(sample_texts(files, DataConfig(tokenizer_sample_bytes=num_bytes, dedup=dedup)))

    assert sample(1000) == ["first ", "zweite Ä", "third"]
    assert sample(1000, dedup=False) == ["first ", "first ", "zweite Ä", "third"]
    assert sample(6) == ["first "]
    assert sample(14) == ["first ", "zweite "]  # the cut falls into the two bytes of Ä
    assert sample(16) == ["first ", "zweite Ä", "t"]


def test_an_empty_corpus_stops_the_training(ray_workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x00")
    with pytest.raises(CorpusError, match=r"the corpus is empty: 1 files, 1 documents dropped \(1 binary\)"):
        ensure_tokenizer(data_config(str(tmp_path), tmp_path / "storage"))


def test_a_word_of_a_megabyte_takes_no_hours(tmp_path: Path) -> None:
    bases = "".join(random.Random(0).choices("ACGT", k=200_000))  # in one piece this trains for half a minute
    (tmp_path / "a.txt").write_text(bases)
    files = list_corpus(f"{tmp_path}/a.txt").files
    pieces = list(sample_texts(files, DataConfig()))
    assert "".join(pieces) == bases
    started_s = time.monotonic()
    assert train_bpe(pieces, vocab_size=1000).vocab_size == 1000
    assert time.monotonic() - started_s < 15
