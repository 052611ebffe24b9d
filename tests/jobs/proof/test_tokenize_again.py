"""A token store is made again from its corpus: an honest one has the same bytes, and what a
dishonest one claims of its making is found."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage, open_storage
from jobs.corpus.listing import list_corpus
from jobs.proof.tokenize_again import Outcome, drawn_by_lot, tokenized_again
from jobs.run.find_run import data_identity, find_tokens
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.ledger_chain import encoded
from jobs.tokens.build_store import store_builder
from jobs.tokens.document_map import DOCUMENTS, RECORD, table_file
from jobs.tokens.token_store import MANIFEST, SOURCES, TOKENIZER, Manifest, read_manifest
from model.text.tokenizer import Tokenizer, train_bpe
from tests.cluster.hub_stub import running_hub
from tests.jobs.corpora import make_corpus
from tests.jobs.mapped_runs import mapped_plan, write_conversations
from tests.jobs.runs import make_text

SETTINGS: dict[str, Any] = {"val_fraction": 0.3, "vocab_size": 300, "shard_bytes": 4000}


def write_texts(folder: Path) -> Path:
    """Writes texts, of which some have few words, and some quote others."""
    texts = [f"{number} {make_text(60 + number, seed=number)}" for number in range(40)]
    quotations = [f"said {' '.join(text.split()[10:30])} {n}" for n, text in enumerate(texts)]
    folder.mkdir(parents=True)
    for name, part in (("a", texts), ("b", quotations)):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def record_start(run: Storage, store: Storage) -> None:
    """Writes a ledger of a run on the store, for which no step is needed."""
    identity = Manifest.from_json(store.read_bytes(MANIFEST)).identity
    run.write_bytes(LEDGER, encoded({"event": "start", "data_identity": identity}, None) + b"\n")


def run_on(folder: Path, **data: Any) -> Storage:
    """Tokenizes the texts that `data` names, and returns the storage of a run on them."""
    plan = mapped_plan(folder, data=data)
    record_start(plan.run, open_storage(plan.tokens_uri))
    return plan.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    run_on(folder, source=[str(write_texts(folder / "texts"))], **SETTINGS)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Storage:
    """A copy of a run on texts, to be spoiled."""
    shutil.copytree(folder / "storage", tmp_path / "storage")
    return open_storage(str(tmp_path / "storage")).child("runs/tiny")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test leaves no scratch file."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield
    assert not any((tmp_path / "scratch").iterdir())


def store_of(run: Storage) -> Storage:
    return find_tokens(run, data_identity(Ledger.read(run)))


def source_of(run: Storage) -> list[str]:
    return recorded_config(run).data.source


def again(run: Storage, num_shards: int = 99, lot: str = "lot") -> Outcome:
    return tokenized_again(run, num_shards=num_shards, lot=lot)


def problem_of(run: Storage, num_shards: int = 99) -> str:
    """Returns the only problem."""
    [problem] = again(run, num_shards).problems
    return str(problem)


def claim(run: Storage, **data: Any) -> None:
    """Changes the recorded settings."""
    settings = yaml.safe_load(run.read_bytes(CONFIG_FILE))
    settings["data"] |= data
    run.write_bytes(CONFIG_FILE, yaml.safe_dump(settings).encode())


def write_manifest(run: Storage, store: Storage, manifest: Manifest) -> None:
    """Writes a manifest as who made the store could: with a document map and a ledger that fit."""
    store.write_bytes(MANIFEST, manifest.to_json())
    listed = json.loads(store.read_bytes(DOCUMENTS)) | {"manifest_hash": manifest.hash}
    store.write_bytes(DOCUMENTS, json.dumps(listed).encode())
    record_start(run, store)


def claim_consistently(run: Storage, **data: Any) -> None:
    """Changes the recorded settings, and all that follows from them but the shards."""
    store = store_of(run)
    manifest = read_manifest(store)
    claim(run, **data)
    config = recorded_config(run)
    tokenizer = Tokenizer.from_json(store.read_bytes(TOKENIZER))
    builder = store_builder(config, list_corpus(config.data.source), tokenizer)
    write_manifest(run, store, replace(manifest, config_hash=builder.config_hash))


def renew_hash(run: Storage, file: str) -> None:
    """Writes a shard's hash into the manifest."""
    store = store_of(run)
    manifest = read_manifest(store)
    digest = hashlib.sha256(store.read_bytes(file)).hexdigest()
    shards = [
        replace(shard, sha256=digest) if shard.file == file else shard for shard in manifest.shards
    ]
    write_manifest(run, store, replace(manifest, shards=tuple(shards)))


def test_an_honest_store_is_made_again_whole(
    run: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = again(run)
    assert outcome.problems == outcome.uncovered == []
    assert outcome.shards == outcome.made_again == outcome.equal > 4
    assert {file.partition("-")[0] for file in outcome.drawn} == {"shard", "val"}
    assert "are read in all, by this one process" in capsys.readouterr().err
    assert outcome.read_bytes > sum(file.size for file in list_corpus(source_of(run)).files)


def test_few_shards_are_drawn_by_lot_and_the_others_stay_uncovered(run: Storage) -> None:
    outcome = again(run, 2)
    assert outcome.problems == []
    assert len(outcome.drawn) == 2 <= outcome.made_again == outcome.equal
    left = outcome.shards - outcome.made_again
    assert left > 0
    assert outcome.uncovered[0].startswith(f"the bytes of {left} of {outcome.shards} shards")
    shards = read_manifest(store_of(run)).shards
    drawn = {lot: drawn_by_lot(shards, 3, lot=lot) for lot in ("one", "other")}
    assert drawn["one"] != drawn["other"]
    assert drawn_by_lot(shards, 2, lot="one") == drawn["one"][:2]
    assert {*drawn_by_lot(shards, 99, lot="one")} == {*shards}


@pytest.mark.more
def test_a_store_of_all_rules_and_kinds_of_files_is_made_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=60)
    rows = "".join(f'{n},"row ""{n}"" \n{n * n} {"word " * 20}{n}"\n' for n in range(300))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "f.csv").write_text(f"number,text\n{rows}")
    (tmp_path / "more" / "g.rst").write_text("\n".join(f"line {n}" for n in range(3000)))
    run = run_on(
        tmp_path,
        source=[str(corpus), f"{tmp_path}/more"],
        weights=[3, 1],
        shard_bytes=5000,
        max_document_bytes=9000,
        text_endings=[".rst"],
        near_dedup_threshold=0.7,
        decontaminate_ngram=5,
        quality_rules=["symbol_ratio"],
        val_fraction=0.2,
        val_max_documents=12,
        validation={"held": f"{tmp_path}/more/f.csv"},
    )
    outcome = again(run)
    assert outcome.problems == []
    assert outcome.shards == outcome.equal > 10
    assert outcome.uncovered == ["the token stores of the validation sets held"]


def test_a_store_of_conversations_is_made_again(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "chat" / "a.jsonl")
    data = {"source": [str(file)], "format": "chat", "val_fraction": 0.2, "vocab_size": 300}
    run = run_on(tmp_path, **data)
    assert again(run).problems == []
    store = store_of(run)
    manifest = read_manifest(store)
    assert manifest.chat
    template = manifest.chat.chat_template.replace("'User'", "'Asker'")
    chat = replace(manifest.chat, chat_template=template)
    write_manifest(run, store, replace(manifest, chat=chat))
    problems = again(run).problems
    assert problems[1] == (
        "the store's conversations have another format than the tokenizer trained on the corpus has"
    )
    assert problems[2].startswith("shard-00000.bin: has other bytes than the corpus makes")


def test_a_dataset_of_the_hub_is_read_at_the_commit_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(tmp_path / "texts")
    files = {f"data/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.commit(files)
        run = run_on(tmp_path, source=["hf://datasets/owner/texts@main/data"], **SETTINGS)
        other = hub.commit(files | {"data/a.jsonl": files["data/b.jsonl"]})
        assert again(run).problems == []
        manifest = read_manifest(store_of(run))
        forged = dict.fromkeys(manifest.revisions, other)
        write_manifest(run, store_of(run), replace(manifest, revisions=forged))
        assert problem_of(run).startswith(
            "sources.json names the corpus hf://datasets/owner/texts@"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert problem_of(run).startswith(
            "the corpus hf://datasets/owner/texts@main/data cannot be read here: "
        )


def test_ready_shards_are_compared_with_their_store(run: Storage, tmp_path: Path) -> None:
    ready = store_of(run)
    sources = [f"{tmp_path}/more", f"tokens://{ready.uri}"]
    write_texts(tmp_path / "more")
    mixed = run_on(tmp_path / "mixed", source=sources, **SETTINGS)
    outcome = again(mixed)
    assert outcome.problems == []
    assert outcome.equal == outcome.shards > len(read_manifest(ready).shards)
    assert outcome.uncovered == [f"how the shards of {sources[1]} were made of text"]
    shutil.rmtree(ready.uri)
    assert "cannot be tokenized again here" in problem_of(mixed)


def test_a_changed_token_is_found_though_its_hash_was_renewed(run: Storage) -> None:
    store = store_of(run)
    shard = read_manifest(store).shards[0]
    ids = np.frombuffer(store.read_bytes(shard.file), "<u2").copy()
    ids[7] += 1
    store.write_bytes(shard.file, ids.tobytes())
    place = np.frombuffer(store.read_bytes(table_file(shard.file)), RECORD)["place"][0]
    parting = (
        f"{shard.file}: has other bytes than the corpus makes, from token 7 on, in the document from "
        f"{source_of(run)[0]}/a.jsonl:{place}"
    )
    altered = f"{shard.file}: has other bytes than the manifest says"
    assert again(run).problems == [altered, parting]
    renew_hash(run, shard.file)
    outcome = again(run)
    assert outcome.problems == [parting]
    assert outcome.equal == outcome.shards - 1


FILTERS: list[dict[str, Any]] = [
    {"decontaminate_ngram": 8},
    {"quality_rules": ["word_count"]},
    {"near_dedup_threshold": 0.2},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_filter_that_never_ran_is_found_by_the_hash_of_the_settings(
    run: Storage, filters: dict[str, Any]
) -> None:
    claim(run, **filters)
    problem = again(run, 1).problems[0]
    assert problem.startswith("the recorded settings have the hash ")
    assert problem.endswith("the store was made with other settings")


@pytest.mark.more
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_filter_that_never_ran_is_found_by_what_it_drops_though_all_hashes_fit(
    run: Storage, filters: dict[str, Any]
) -> None:
    """In the whole store, whichever shard is drawn."""
    claim_consistently(run, **filters)
    told = " ".join(again(run, 1).problems)
    assert "with other documents than the recorded settings select: first should come" in told
    assert "the manifest counts 0 documents dropped as" in told
    assert "the recorded settings have the hash" not in told
    outcome = again(run)
    assert outcome.equal < outcome.shards


def test_a_corpus_that_is_not_there_is_a_problem(run: Storage) -> None:
    claim(run, source=["/licensed/public-domain"])
    assert problem_of(run).startswith(
        "the corpus /licensed/public-domain cannot be read here: nothing is at "
    )
    assert again(run).uncovered[0].startswith("the bytes of 14 of 14 shards")


def test_another_corpus_is_found(run: Storage, tmp_path: Path) -> None:
    """By its name; by its files, where the store names it too; and by its text, where the files
    are alike in name and size."""
    source = source_of(run)[0]
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "c.txt").write_text("one more")
    claim(run, source=[str(other)])
    assert problem_of(run) == (
        f"sources.json names the corpus {source}, the recorded settings name {other}"
    )
    store = store_of(run)
    for name in (SOURCES, DOCUMENTS):
        store.write_bytes(name, store.read_bytes(name).replace(source.encode(), bytes(other)))
    assert problem_of(run) == f"the corpus is not as sources.json has it: {other}/c.txt is new"
    (other / "c.txt").unlink()
    assert again(run).problems == []
    text = (other / "b.jsonl").read_text()
    (other / "b.jsonl").write_text(text.replace("said", "says", 1))
    outcome = again(run)
    assert outcome.equal < outcome.shards
    told = " ".join(outcome.problems)
    assert "the manifest says source_hash=" in told
    assert f"{other}/b.jsonl has another version than before" in told
    assert f"in the document from {other}/b.jsonl:0" in told


@pytest.mark.more
def test_of_two_stores_with_the_same_tokens_the_settings_one_is_compared(tmp_path: Path) -> None:
    places = [str(write_texts(tmp_path / name)) for name in ("one", "other")]
    runs = [run_on(tmp_path, source=[place], **SETTINGS) for place in places]
    stores = {again(runs[-1]).store}
    for place in places:
        claim(runs[-1], source=[place])
        outcome = again(runs[-1], 1)
        assert outcome.problems == []
        stores.add(outcome.store)
    assert len(stores) == 2


def test_a_corpus_that_changed_since_is_named(run: Storage, tmp_path: Path) -> None:
    source = source_of(run)[0]
    other = tmp_path / "other"
    shutil.copytree(source, other)
    claim(run, source=[str(other)])
    store = store_of(run)
    store.write_bytes(SOURCES, store.read_bytes(SOURCES).replace(source.encode(), bytes(other)))
    (other / "a.jsonl").write_text("")
    (other / "b.jsonl").rename(other / "d.jsonl")
    begin = "the corpus is not as sources.json has it:"
    assert again(run).problems == [
        f"{begin} {other}/b.jsonl is missing",
        f"{begin} {other}/d.jsonl is new",
        f"{begin} {other}/a.jsonl has another size",
    ]
    store.delete(SOURCES)
    assert problem_of(run) == "sources.json is missing or damaged"


@pytest.mark.more
def test_another_file_in_the_document_map_is_found(run: Storage) -> None:
    store = store_of(run)
    listed = store.read_bytes(DOCUMENTS)
    store.write_bytes(DOCUMENTS, listed.replace(b"b.jsonl", b"z.jsonl"))
    assert "names 1 file otherwise than the corpus: the first is " in problem_of(run)
    store.write_bytes(DOCUMENTS, listed)
    shard = read_manifest(store).shards[0].file
    records = np.frombuffer(store.read_bytes(table_file(shard)), RECORD).copy()
    records["file"][1], records["place"][1] = 1, 0
    store.write_bytes(table_file(shard), records.tobytes())
    assert problem_of(run) == f"{shard}: its table {table_file(shard)} is missing or altered"
    values = json.loads(listed)
    for table in values["tables"]:
        if table["shard"] == shard:
            table["sha256"] = hashlib.sha256(records.tobytes()).hexdigest()
    store.write_bytes(DOCUMENTS, json.dumps(values).encode())
    assert f"has document 1 from {source_of(run)[0]}/b.jsonl:0, expected " in problem_of(run)
    store.write_bytes(DOCUMENTS, json.dumps(values | {"manifest_hash": "0"}).encode())
    assert problem_of(run).endswith("belongs to another manifest")
    store.delete(DOCUMENTS)
    outcome = again(run)
    assert (outcome.problems, len(outcome.uncovered)) == ([], 1)
    assert outcome.uncovered[0].startswith("from which files the documents are")


@pytest.mark.more
def test_a_tokenizer_that_was_exchanged_is_found(run: Storage, tmp_path: Path) -> None:
    store = store_of(run)
    other = train_bpe([make_text(200, seed=7)] * 3, vocab_size=300)
    store.write_bytes(TOKENIZER, other.to_json())
    assert problem_of(run).endswith("it was exchanged")
    manifest = read_manifest(store)
    manifest = replace(manifest, tokenizer_hash=other.hash, vocab_size=other.vocab_size)
    write_manifest(run, store, manifest)
    told = " ".join(again(run).problems)
    assert "the tokenizer trained on the corpus has the hash" in told
    assert "has other bytes than the corpus makes" in told
    path = tmp_path / "other.json"
    path.write_bytes(other.to_json())
    made = run_on(tmp_path / "made", source=source_of(run), tokenizer=str(path), **SETTINGS)
    assert again(made).problems == []
    claim(made, tokenizer=None)
    assert problem_of(made).startswith("the tokenizer trained on the corpus has the hash ")
    claim(made, tokenizer="/licensed/tokenizer.json")
    assert problem_of(made).startswith(
        "the tokenizer /licensed/tokenizer.json cannot be compared here: "
    )


@pytest.mark.more
def test_figures_of_the_manifest_that_are_invented_are_found(run: Storage) -> None:
    store = store_of(run)
    manifest = read_manifest(store)
    first, *rest = manifest.shards
    inflated = replace(first, bytes=first.bytes + 1)
    write_manifest(run, store, replace(manifest, shards=(inflated, *rest)))
    assert problem_of(run) == (
        f"{first.file}: the manifest says bytes={first.bytes + 1}, expected {first.bytes}"
    )
    write_manifest(run, store, replace(manifest, dropped=manifest.dropped | {"duplicate": 5}))
    assert problem_of(run, 1) == (
        "the manifest counts 5 documents dropped as duplicate, the recorded settings drop 0"
    )
    write_manifest(run, store, replace(manifest, replaced_utf8=3))
    assert problem_of(run) == "the manifest says replaced_utf8=3, expected 0"
    assert again(run, 1).problems == []
    write_manifest(run, store, replace(manifest, shards=(*rest, first)))
    assert "shards with other documents than the recorded settings select" in problem_of(run)
    write_manifest(run, store, replace(manifest, shards=tuple(rest)))
    problems = again(run).problems
    assert (
        f"{first.file}: the corpus makes this shard, and the manifest does not list it" in problems
    )


def test_what_cannot_be_made_again_is_said(run: Storage) -> None:
    with pytest.raises(ConfigError, match="--tokenize 0: expected at least 1 shard"):
        again(run, 0)
    store = store_of(run)
    manifest = read_manifest(store)
    first, *rest = manifest.shards
    store.write_bytes("train.bin", store.read_bytes(first.file))
    shards = (replace(first, file="train.bin"), *rest)
    write_manifest(run, store, replace(manifest, shards=shards))
    assert problem_of(run).startswith("the manifest lists train.bin, expected names such as")
    store.delete("train.bin")
    assert "train.bin is missing" in problem_of(run)
    store.delete(MANIFEST)
    assert problem_of(run).startswith("none of the 0 token stores under ")
