"""`raymill where` of real runs: the steps of each document, the documents of each step, and what is
said where there is no answer."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import main
from cluster.settings.batch_schedule import BatchSchedule
from cluster.settings.parser import ConfigError
from cluster.settings.run import batch_schedule
from cluster.storage.uris import Storage, open_storage
from jobs.proof.where_run import where
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.run_plan import RunPlan, open_stream
from jobs.tokens.build_store import tokenize
from jobs.tokens.document_map import DOCUMENTS, DocumentMap
from jobs.tokens.token_store import TokenStoreError, read_manifest
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from tests.jobs.cleaning.in_process import tokenize_in_process
from tests.jobs.mapped_runs import SEQ_LEN, mapped_plan, write_conversations
from tests.jobs.poisoned_runs import Faults, run_world

SKIPPED, WINDOW = 2, (4, 8)
"""The step that is skipped, and the window of the rollback, of the run that meets both."""

LEFT_OUT = 6
"""The step of a checkpoint within the window, whose weights do not lead to the run's."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run to its end: a step is skipped, two in a row are rolled back."""
    train = {"max_skipped_steps": 1, "max_tokens": 2000}
    plan = mapped_plan(tmp_path_factory.mktemp("mapped"), train=train)
    run_world(plan, Faults(poisoned=frozenset({(SKIPPED, 0), (7, 0), (8, 0)})))
    return plan


@pytest.fixture
def copied(plan: RunPlan, tmp_path: Path) -> Storage:
    """A copy of the run and of its store, to be spoiled."""
    shutil.copytree(plan.config.storage.uri, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def schedule_of(plan: RunPlan) -> BatchSchedule:
    return batch_schedule(plan.config)


def steps_taken(plan: RunPlan) -> Iterator[tuple[int, str]]:
    """Yields each step of the run, with what became of it."""
    for step in range(1, schedule_of(plan).max_steps + 1):
        rolled_back = "rolled back" if WINDOW[0] <= step <= WINDOW[1] else "learned"
        yield step, "skipped" if step == SKIPPED else rolled_back


def test_the_run_is_as_the_tests_mean_it(plan: RunPlan) -> None:
    ledger = Ledger.read(plan.run)
    assert next(line["step"] for line in ledger.events("skip")) == SKIPPED
    assert ledger.rollbacks == (WINDOW,)
    assert LEFT_OUT in map(step_of, RunCheckpoints(plan.run).names)
    assert schedule_of(plan).max_steps > 12
    assert len(schedule_of(plan).lane_counts) > 1


def test_the_documents_of_each_step_are_the_rows_that_it_read(plan: RunPlan) -> None:
    """The tokens come from the stream by which the run was trained."""
    stream = open_stream(plan)
    tokenizer = Tokenizer.from_json(plan.tokenizer_json)
    for step, outcome in steps_taken(plan):
        answer = where(plan.run, step=step).json()
        assert answer["outcome"] == outcome
        samples = schedule_of(plan).samples(step)
        assert [row["sample"] for row in answer["rows"]] == [*samples]
        _, targets = stream.samples(samples)
        for row, ids in zip(answer["rows"], targets.tolist(), strict=True):
            lengths = [document["tokens"] for document in row["documents"]]
            assert sum(lengths) == SEQ_LEN
            borders = np.cumsum([0, *lengths])
            for document, start, end in zip(row["documents"], borders, borders[1:], strict=False):
                part = ids[start:end]
                assert tokenizer.eot_id not in part[:-1], "it is one document's"
                text = source_text(document)
                assert tokenizer.decode([i for i in part if i != tokenizer.eot_id]) in text
                assert text.startswith(document["text"].removesuffix("…")[:20])


def source_text(document: dict[str, Any]) -> str:
    """Reads a document from its file and place alone."""
    path = Path(document["file"])
    content = path.read_bytes()[document["place"] :]
    if path.suffix == ".jsonl":
        return str(json.loads(content.partition(b"\n")[0])["text"])
    return content.decode()


@pytest.mark.more
def test_both_directions_agree_for_every_document(plan: RunPlan) -> None:
    expected: dict[tuple[str, int], list[tuple[int, int, int, int, int, str]]] = {}
    for step, outcome in steps_taken(plan):
        for row in where(plan.run, step=step).json()["rows"]:
            for document in row["documents"]:
                turn = (step, row["lane"], row["sample"], row["epoch"])
                place = document["file"], document["place"]
                expected.setdefault(place, []).append((*turn, document["tokens"], outcome))
    store = open_storage(plan.tokens_uri)
    mapped = DocumentMap(store, read_manifest(store))
    kept = {(mapped.files[document.file][0], document.place) for document in all_of(mapped)}
    held_out = kept - expected.keys()
    assert held_out
    assert len(expected) > 15
    fields = ("step", "lane", "sample", "epoch", "tokens", "outcome")
    firsts: set[int] = set()
    for file, place in sorted(kept):
        (found,) = where(plan.run, document=f"{file}:{place}").json()["documents"]
        turns = [tuple(turn[name] for name in fields) for turn in found["turns"]]
        assert turns == expected.get((file, place), [])
        is_held_out = found["held_out_tokens"] == found["tokens"]
        assert is_held_out == found["verdict"].startswith("held out")
        assert is_held_out or not found["held_out_tokens"]
        learned = [turn[0] for turn in turns if turn[-1] == "learned"]
        assert found["first_step"] == min(learned, default=None)
        assert found["last_step"] == max(learned, default=None)
        if learned:
            names = [name for name in RunCheckpoints(plan.run).names if step_of(name) != LEFT_OUT]
            before = [name for name in names if step_of(name) < learned[0]]
            assert found["checkpoint_before"] == max(before, default=None)
            firsts.add(learned[0])
        (by_text,) = where(plan.run, text=source_text(found | {"place": place})).json()["documents"]
        assert by_text == found
    assert max(turn[3] for turns in expected.values() for turn in turns) > 1, "several epochs"
    assert WINDOW[1] + 1 in firsts, "the newest checkpoint before that one is left out"


def all_of(mapped: DocumentMap) -> Iterator[Any]:
    for shard in mapped.manifest.shards:
        documents = mapped.documents_of(shard.file)
        assert documents is not None
        yield from (documents.document(number) for number in range(len(documents)))


def test_a_whole_file_has_the_steps_of_its_documents(plan: RunPlan) -> None:
    (found,) = where(plan.run, document="web/a.jsonl").json()["documents"]
    assert found["documents"] > 10
    assert found["place"] is None
    assert 0 < found["held_out_tokens"] < found["tokens"]
    samples = {
        row["sample"]: sum(part["tokens"] for part in row["documents"] if "a.jsonl" in part["file"])
        for step, _ in steps_taken(plan)
        for row in where(plan.run, step=step).json()["rows"]
    }
    assert {turn["sample"]: turn["tokens"] for turn in found["turns"]} == {
        sample: tokens for sample, tokens in samples.items() if tokens
    }


def test_people_and_programs_read_the_answers(
    plan: RunPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage.uri", plan.config.storage.uri]
    assert main(["where", "tiny", "--document", "0.txt", *storage]) == 0
    text = capsys.readouterr().out
    assert re.search(r"learned at \d+ steps, first \d+, last \d+", text)
    assert re.search(r"\n\d+ +\d +\d +\d+ +learned\n", text)
    assert main(["where", "tiny", "--document", "0.txt", "--json", *storage]) == 0
    (document,) = json.loads(capsys.readouterr().out)["documents"]
    assert document["place"] == 0
    assert main(["where", "tiny", "--step", str(SKIPPED), *storage]) == 0
    text = capsys.readouterr().out
    assert f"step {SKIPPED}: skipped, " in text
    assert "web/a.jsonl:" in text
    assert main(["where", "tiny", "--step", "3", "--text", "a", *storage]) == 2
    assert main(["where", "tiny", *storage]) == 2
    capsys.readouterr()
    assert main(["where", "tiny", "--step", "1000", *storage]) == 2
    assert "has steps 1 to" in capsys.readouterr().err


def cut_ledger(run: Storage, *, after_step: int) -> None:
    """Leaves the lines up to that of a step."""
    lines = run.read_bytes(LEDGER).splitlines(keepends=True)
    steps = [json.loads(line).get("step") if b'"event"' not in line else None for line in lines]
    run.write_bytes(LEDGER, b"".join(lines[: steps.index(after_step) + 1]))


def append(run: Storage, *lines: dict[str, Any]) -> None:
    added = "".join(json.dumps(line) + "\n" for line in lines).encode()
    run.write_bytes(LEDGER, run.read_bytes(LEDGER) + added)


def test_steps_to_come_and_steps_gone_back_behind_are_not_learned(
    plan: RunPlan, copied: Storage
) -> None:
    turns = where(plan.run, document="0.txt").json()["documents"][0]["turns"]
    last = turns[-1]["step"]
    cut_ledger(copied, after_step=last - 1)
    (found,) = where(copied, document="0.txt").json()["documents"]
    assert {turn["outcome"] for turn in found["turns"] if turn["step"] >= last} == {"to come"}
    with pytest.raises(UserError, match=rf"step {last} is not taken yet: .* is at step {last - 1}"):
        where(copied, step=last)
    append(copied, {"event": "corruption", "to_step": 2, "generation": 1, "attempt": 1, "step": 5})
    (found,) = where(copied, document="0.txt").json()["documents"]
    assert {turn["outcome"] for turn in found["turns"] if turn["step"] > 2} == {"to come"}


def test_steps_on_another_store_are_told_apart(plan: RunPlan, copied: Storage) -> None:
    start = Ledger.read(copied).events("start")[-1]
    steps = Ledger.read(copied).steps
    other = start | {"data_identity": "0" * 64}
    copied.write_bytes(LEDGER, b"")
    append(copied, other, *steps[:5], start, *steps[5:])
    (found,) = where(copied, document="a.jsonl").json()["documents"]
    border = steps[5]["step"]
    outcomes = {(turn["step"] < border, turn["outcome"]) for turn in found["turns"]}
    assert (True, "other data") in outcomes
    assert (True, "learned") not in outcomes
    assert (False, "other data") not in outcomes
    with pytest.raises(TokenStoreError, match="none of the 1 token stores"):
        where(copied, step=1)


def test_a_store_without_a_map_says_how_to_make_one(copied: Storage) -> None:
    (listed,) = Path(copied.uri).parents[1].glob(f"tokens/*/{DOCUMENTS}")
    listed.unlink()
    expected = r"has no document map .*`raymill tokenize --documents` with the run's settings, .*config\.yaml"
    with pytest.raises(UserError, match=expected):
        where(copied, document="a.jsonl")


def test_a_second_store_of_the_same_text_lends_its_map(
    plan: RunPlan, copied: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the first one has none and its files were moved since."""
    (listed,) = Path(copied.uri).parents[1].glob(f"tokens/*/{DOCUMENTS}")
    listed.unlink()
    moved = Path(plan.config.data.source[0]).parent
    shutil.copytree(moved, tmp_path / "moved")
    sources = [str(tmp_path / "moved" / name) for name in ("web", "books")]
    data = plan.config.data.model_copy(update={"source": sources})
    storage = plan.config.storage.model_copy(update={"uri": str(tmp_path / "copy")})
    tokenize_in_process(monkeypatch)
    tokenize(plan.config.model_copy(update={"data": data, "storage": storage}))
    (found,) = where(copied, document="a.jsonl:0").json()["documents"]
    (expected,) = where(plan.run, document="a.jsonl:0").json()["documents"]
    assert found["file"] == f"{tmp_path}/moved/web/a.jsonl"
    assert found | {"file": expected["file"]} == expected


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("nowhere.txt", r"nowhere\.txt is no file that .* it has 5 files, such as /"),
        ("empty.jsonl", r"empty\.jsonl gave no document to .*: all that it holds were dropped"),
        (".txt:0", r"\.txt is no file that"),
        (f"a.jsonl:{10**17}", r"no document begins at byte 1000.* begin before it at \d+$"),
        (f"a.jsonl:{10**40}", "is no file that"),
        ("a.jsonl:1", r"no document begins at byte 1 of .*begin before it at 0 and behind it at"),
    ],
)
def test_a_wrong_file_or_place_is_named(plan: RunPlan, document: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        where(plan.run, document=document)


def test_a_dropped_document_has_its_reason(plan: RunPlan, copied: Storage) -> None:
    path = Path(plan.config.data.source[0]) / "a.jsonl"
    content = path.read_bytes()
    broken = content.index(b"{broken")
    first, second = (found.start() for found in re.finditer(rb'\{"text": "1 ', content))
    for run in (plan.run, copied):
        with pytest.raises(UserError, match=rf"{broken} was dropped: invalid_json"):
            where(run, document=f"a.jsonl:{broken}")
        with pytest.raises(UserError, match=rf"{second} was dropped: duplicate"):
            where(run, document=f"a.jsonl:{second}")
        assert where(run, document=f"a.jsonl:{first}")
        # Without the manifest's samples the file itself is asked
        if run is plan.run:
            forget_samples(copied)


def forget_samples(run: Storage) -> None:
    """Takes the samples of dropped documents out of the store's manifest."""
    (path,) = Path(run.uri).parents[1].glob("tokens/*/manifest.json")
    store = open_storage(str(path.parent))
    values = json.loads(path.read_bytes())
    path.write_text(json.dumps(values | {"drop_samples": {}}))
    listed = json.loads(store.read_bytes(DOCUMENTS))
    listed["manifest_hash"] = read_manifest(store).hash
    store.write_bytes(DOCUMENTS, json.dumps(listed).encode())


def test_a_file_that_changed_or_is_gone_is_named_with_its_steps(tmp_path: Path) -> None:
    """What was learned is in the store; the file's place is only a name."""
    plan = mapped_plan(tmp_path, train={"max_tokens": 400})
    run_world(plan)
    path = Path(plan.config.data.source[0]) / "a.jsonl"
    (before,) = where(plan.run, document="a.jsonl:0").json()["documents"]
    assert before["file_now"] is None
    path.write_bytes(path.read_bytes() + b"\n")
    (changed,) = where(plan.run, document="a.jsonl:0").json()["documents"]
    assert re.search(r"has changed since it was tokenized, from .* bytes", changed["file_now"])
    with pytest.raises(UserError, match=r"begins at 1; whether one was dropped .* has changed"):
        where(plan.run, document="a.jsonl:1")
    verdicts = {
        where(plan.run, document=f"{number}.txt").json()["documents"][0]["verdict"]
        for number in range(3)
    }
    assert (
        "not learned: the run ends before it takes a row with tokens of it that count" in verdicts
    )
    path.unlink()
    (gone,) = where(plan.run, document="a.jsonl:0").json()["documents"]
    assert gone["file_now"] == f"{path} is gone"
    for now in (changed, gone):
        assert now | {"file_now": None} == before


def test_text_that_is_no_whole_document_is_not_found(plan: RunPlan) -> None:
    text = (Path(plan.config.data.source[1]) / "0.txt").read_text()
    assert where(plan.run, text=text).json()["documents"][0]["place"] == 0
    with pytest.raises(UserError, match=r"has exactly this text, of .* its last line end"):
        where(plan.run, text=text.rstrip("\n"))
    with pytest.raises(ConfigError, match=r"has steps 1 to"):
        where(plan.run, step=0)


def test_of_a_conversation_the_tokens_of_answers_count(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "texts" / "chat.jsonl")
    data = {"source": [str(file)], "format": "chat"}
    plan = mapped_plan(tmp_path, train={"max_tokens": 800}, data=data)
    run_world(plan)
    stream = open_stream(plan)
    by_document: dict[int, list[tuple[int, int]]] = {}
    for step in range(1, schedule_of(plan).max_steps + 1):
        _, targets = stream.samples(schedule_of(plan).samples(step))
        rows = where(plan.run, step=step).json()["rows"]
        for row, num_counted in zip(rows, (targets != IGNORE_INDEX).sum(1).tolist(), strict=True):
            assert sum(document["tokens"] for document in row["documents"]) == num_counted
            for document in row["documents"]:
                if document["tokens"]:
                    turns = by_document.setdefault(document["place"], [])
                    turns.append((row["sample"], document["tokens"]))
    assert len(by_document) > 5
    for place, turns in by_document.items():
        (found,) = where(plan.run, document=f"chat.jsonl:{place}").json()["documents"]
        assert [(turn["sample"], turn["tokens"]) for turn in found["turns"]] == turns
    with pytest.raises(UserError, match="this store holds conversations"):
        where(plan.run, text="anything")
