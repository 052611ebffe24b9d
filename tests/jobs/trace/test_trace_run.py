"""`raymill trace` of real runs: a passage's documents, and the steps that read its tokens."""

import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.settings.run import batch_schedule
from cluster.storage.uris import Storage, open_storage
from jobs.proof.where_run import where
from jobs.run.run_plan import RunPlan, open_stream
from jobs.tokens.division import HeldOut, divide
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import MANIFEST, read_manifest
from jobs.trace.build_index import index_store
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.trace_index import INDEX, TRACE
from jobs.trace.trace_run import trace
from raymill.errors import UserError
from tests.jobs.cleaning.in_process import InProcess
from tests.jobs.mapped_runs import SEQ_LEN, mapped_plan
from tests.jobs.planted_runs import PASSAGE, ROLLED_BACK, planted_plan
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import make_text


@pytest.fixture
def copied(plan: RunPlan, tmp_path: Path) -> Storage:
    """A copy of the run and of its store, to be spoiled."""
    shutil.copytree(plan.config.storage.uri, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def store_of(run: Storage) -> Path:
    (manifest,) = Path(run.uri).parents[1].glob(f"tokens/*/{MANIFEST}")
    return manifest.parent


def query(word: str = "unheard") -> str:
    return f"{word} of: {PASSAGE} and so on"


def span_in(run: Storage, text: str, **how: Any) -> dict[str, Any]:
    (span,) = trace(run, text, **({"min_tokens": 12} | how)).json()["spans"]
    return span  # type: ignore[no-any-return]


@pytest.mark.more
def test_a_passage_has_its_documents_and_the_steps_that_read_its_tokens(plan: RunPlan) -> None:
    """The tokens come from the stream by which the run was trained."""
    span = span_in(plan.run, query())
    assert span["text"].strip() == PASSAGE
    places = span["places"]
    assert span["occurrences"] == span["occurrences_at_most"] == len(places) >= 2
    indexed = IndexedStore.open(open_storage(plan.tokens_uri))
    ids = set(indexed.encoded(f" {PASSAGE} a").tolist()[1:-2])
    stream, schedule = open_stream(plan), batch_schedule(plan.config)
    read: Counter[int] = Counter()
    for step in range(1, schedule.max_steps + 1):
        _, targets = stream.samples(schedule.samples(step))
        read[step] = sum(token in ids for token in targets.flatten().tolist())
    read = +read
    traced: Counter[int] = Counter()
    outcomes: dict[int, str] = {}
    for place in places:
        for turn in place["turns"]:
            traced[turn["step"]] += turn["tokens"]
            outcomes[turn["step"]] = turn["outcome"]
    # The blanks around the passage are in the span too, and are no tokens of its own
    assert traced.keys() == read.keys()
    for step, num_tokens in traced.items():
        assert read[step] <= num_tokens <= read[step] + 2 * len(places)
    learned = [step for step, outcome in outcomes.items() if outcome == "learned"]
    assert (span["steps"], span["first_step"]) == (len(learned), min(learned))
    assert span["last_step"] == max(learned)
    rolled_back = {step for step, outcome in outcomes.items() if outcome == "rolled back"}
    assert rolled_back == {s for s in read if ROLLED_BACK[0] <= s <= ROLLED_BACK[1]}
    for place in places:
        content = Path(place["file"]).read_bytes()[place["place"] :]
        text = json.loads(content.partition(b"\n")[0])["text"]
        assert PASSAGE in text
        assert text.startswith(place["text"].removesuffix("…")[:20])
        reference = f"{place['file']}:{place['place']}"
        (document,) = where(plan.run, document=reference).json()["documents"]
        turns = {(turn["step"], turn["lane"], turn["outcome"]) for turn in document["turns"]}
        assert {(t["step"], t["lane"], t["outcome"]) for t in place["turns"]} <= turns


def test_a_checkpoint_knows_no_later_step(plan: RunPlan) -> None:
    whole = span_in(plan.run, query())
    for step in (whole["first_step"], whole["last_step"] - 1):
        before = span_in(plan.run, query(), step=step)
        assert before["last_step"] <= step
        assert before["first_step"] == whole["first_step"]
    if whole["first_step"] > 1:
        none_yet = span_in(plan.run, query(), step=whole["first_step"] - 1)
        assert none_yet["steps"] == 0
        assert none_yet["verdict"].startswith("not learned")
    for step, expected in ((0, "has taken steps 1 to"), (5, "went back behind this step")):
        with pytest.raises(UserError, match=expected):
            trace(plan.run, query(), min_tokens=12, step=step)


@pytest.mark.slow
def test_what_stands_very_often_is_counted_and_a_thousand_places_are_listed(
    tmp_path: Path,
) -> None:
    texts = [f"{number} x {PASSAGE} y" for number in range(1300)]
    plan = planted_plan(tmp_path, texts, train={"max_tokens": 400}, shard_bytes=1 << 20)
    run_world(plan)
    index_store(open_storage(plan.tokens_uri), run=InProcess())
    answer = trace(plan.run, query(), min_tokens=12)
    (span,) = answer.json()["spans"]
    in_training = read_manifest(open_storage(plan.tokens_uri)).total("documents", "train")
    assert 1000 < in_training == span["occurrences"] == span["occurrences_at_most"]
    assert len(span["places"]) == 1000
    assert len({place["place"] for place in span["places"]}) == 1000
    shown = answer.text()
    assert f"occurrences  {span['occurrences']:,}\n" in shown
    assert "of its first 1,000 occurrences" in shown
    assert shown.endswith("and 995 more, which --json has\n")


@pytest.mark.slow
def test_a_run_of_one_text_is_traced_in_what_it_trains_on(tmp_path: Path) -> None:
    """The end of the text is held out, whatever the store's splits are."""
    held_out = PASSAGE[::-1]
    words = make_text(400).strip()
    text = tmp_path / "texts" / "one.txt"
    text.parent.mkdir()
    text.write_text(f"{words} {PASSAGE} {words} {held_out}")
    plan = mapped_plan(tmp_path, train={"max_tokens": 400}, data={"source": [str(text)]})
    manifest = read_manifest(open_storage(plan.tokens_uri))
    divided = divide(manifest, seq_len=SEQ_LEN, val_fraction=0.15, has_sets=False)
    assert divided.held_out is HeldOut.END
    plan = replace(plan, division=divided)
    run_world(plan)
    index_store(open_storage(plan.tokens_uri), run=InProcess())
    assert PASSAGE in span_in(plan.run, query())["text"]
    assert not trace(plan.run, f"unheard {held_out} and so on", min_tokens=12).spans


def test_of_a_conversation_only_answers_are_learned(tmp_path: Path) -> None:
    lines = []
    for number in range(20):
        asked, answered = (make_text(12, seed=seed).strip() for seed in (number, 100 + number))
        values = {"prompt": asked, "completion": answered}
        if number in (3, 12):
            values["prompt" if number == 3 else "completion"] += f" {PASSAGE} {asked}"
        lines.append(json.dumps(values) + "\n")
    file = tmp_path / "texts" / "chat.jsonl"
    file.parent.mkdir()
    file.write_text("".join(lines))
    data = {"source": [str(file)], "format": "chat", "val_fraction": 0.05}
    plan = mapped_plan(tmp_path, train={"max_tokens": 2600}, data=data)
    run_world(plan)
    index_store(open_storage(plan.tokens_uri), run=InProcess())
    span = span_in(plan.run, query())
    first_bytes = [file.read_bytes().index(line.encode()) for line in (lines[3], lines[12])]
    assert [place["place"] for place in span["places"]] == first_bytes
    asked, answered = span["places"]
    assert not asked["turns"]
    assert answered["first_step"] >= 1
    by_epoch = Counter[int]()
    for turn in answered["turns"]:
        by_epoch[turn["epoch"]] += turn["tokens"]
    assert by_epoch[1] == span["tokens"]


def test_text_of_nowhere_has_no_spans(plan: RunPlan) -> None:
    answer = trace(plan.run, "Quite another text, of which nobody wrote a word.", min_tokens=12)
    assert (answer.spans, answer.traced_tokens) == ([], 0)
    assert answer.text().startswith(f"0 of {answer.tokens} tokens stand in 0 spans")


def test_people_and_programs_read_the_answers(
    plan: RunPlan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    storage = ["--storage.uri", plan.config.storage.uri]
    assert main(["trace", "index", *storage]) == 0
    capsys.readouterr()
    assert main(["trace", "find", "tiny", query(), *storage]) == 0
    text = capsys.readouterr().out
    assert PASSAGE in text
    assert "learned at" in text
    assert "a.jsonl:" in text
    (tmp_path / "text").write_text(query())
    stdin = io.TextIOWrapper(io.BytesIO(query().encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    answers = []
    for given in ([query()], ["--file", str(tmp_path / "text")], ["-"]):
        assert main(["trace", "find", "tiny", *given, "--json", *storage]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == answers[2]
    (tmp_path / "text").write_bytes(b"abc\xff")
    for given, expected in (
        (["--file", str(tmp_path / "text")], "no UTF-8 text, from byte 3"),
        (["--file", str(tmp_path / "none")], "No such file"),
        (["short"], "and the shortest span 12; give more"),
        ([query(), "--min-tokens", "5"], "finds spans of 12 tokens or more"),
    ):
        assert main(["trace", "find", "tiny", *given, *storage]) == 1
        assert expected in capsys.readouterr().err
    assert main(["trace", "find", "tiny", *storage]) == 2


def test_a_store_without_an_index_says_how_to_make_one(copied: Storage) -> None:
    store = store_of(copied)
    shutil.rmtree(store / TRACE)
    with pytest.raises(
        UserError, match=rf"has no trace index; `raymill trace index {store}` makes"
    ):
        trace(copied, query(), min_tokens=12)


def test_an_index_of_another_store_is_refused_with_the_two_hashes(
    plan: RunPlan, copied: Storage
) -> None:
    listed = store_of(copied) / TRACE / INDEX
    values = json.loads(listed.read_bytes())
    own = values["manifest_hash"]
    listed.write_text(json.dumps(values | {"manifest_hash": "f" * 64}))
    with pytest.raises(UserError, match=rf"hash f{{64}}, this store has {own}"):
        trace(copied, query(), min_tokens=12)
    index_store(open_storage(str(store_of(copied))), run=InProcess())
    assert span_in(copied, query()) == span_in(plan.run, query())


def test_a_store_without_a_map_has_spans_and_steps_still(plan: RunPlan, copied: Storage) -> None:
    (store_of(copied) / DOCUMENTS).unlink()
    answer = trace(copied, query(), min_tokens=12)
    assert "documents are unknown: the store has no document map" in answer.text()
    (span,) = answer.json()["spans"]
    expected = span_in(plan.run, query())
    no_document = {"file": None, "place": None, "text": None}
    expected["places"] = [place | no_document for place in expected["places"]]
    assert span == expected


def test_a_part_that_is_cut_off_is_named(copied: Storage) -> None:
    (part,) = (store_of(copied) / TRACE).glob("*/part-*.idx")
    part.write_bytes(part.read_bytes()[:5])
    with pytest.raises(
        UserError, match=r"part-00000\.idx is missing or damaged; `raymill trace index"
    ):
        trace(copied, query(), min_tokens=12)
    index_store(open_storage(str(store_of(copied))), run=InProcess())
    assert span_in(copied, query())["occurrences"]
