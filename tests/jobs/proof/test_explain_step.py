"""`raymill explain` of real runs: a document that was planted is named with its lane and row, and the
figures are those of the run."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from torch import Tensor

from cluster.cli import main
from cluster.settings.parser import ConfigError
from cluster.settings.run import batch_schedule, to_yaml
from cluster.storage.uris import Storage, open_storage
from jobs.exact.lane_passes import LanePasses
from jobs.proof.explain.explain_step import explain
from jobs.proof.where_run import where
from jobs.run.checkpoints import checkpoint_name
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.run_plan import RunPlan, open_stream
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.publisher import Published, Publisher
from jobs.tokens.document_map import DOCUMENTS
from jobs.training.train_loop import train
from model.files.checkpoint_folder import Metadata
from model.files.state_hash import StateHashes
from model.linear_cross_entropy import IGNORE_INDEX
from raymill.errors import UserError
from raymill.step_timer import StepTimer
from tests.jobs.mapped_runs import mapped_plan, write_conversations
from tests.jobs.runs import make_text
from tests.jobs.tampering import change_setting
from tests.waiting import wait_until

SKIPPED = 6
"""The step whose loss a fault of the machine makes NaN."""

WINDOW = (13, 16)
"""The steps that a rollback has left out, as the last two are poisoned."""

LEARNED = 20
"""A step after which the model knows the letters of the other texts."""

PLANTED = "planted.txt"


def write_texts(folder: Path) -> Path:
    """Writes short texts of few letters, and one of characters that no other has."""
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(make_text(2, seed=number))
    planted = "".join(random.Random(0).choices([chr(0x4E00 + code) for code in range(999)], k=20))
    (folder / PLANTED).write_text(planted)
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run to its end, in which a step is skipped and a few are rolled back."""
    plan = planted_plan(tmp_path_factory.mktemp("planted"))
    train_poisoned(plan)
    return plan


def planted_plan(folder: Path) -> RunPlan:
    data = {"source": [str(write_texts(folder / "texts"))], "val_fraction": 0.1}
    train_settings = {
        "max_tokens": 9000,
        "document_mask": True,
        "max_skipped_steps": 1,
        "shuffle_window_rows": 20,
    }
    return mapped_plan(folder, data=data, train=train_settings)


def train_poisoned(plan: RunPlan) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, SKIPPED, WINDOW[1] - 1, WINDOW[1])
        train(plan, rank=0, world_size=1)


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Makes the loss of the first micro-batch of these steps NaN."""
    take = LanePasses.take

    def faulty(
        self: LanePasses, step: int, number: int, timer: StepTimer, **options: Any
    ) -> Tensor:
        factor = float("nan") if step in steps and number == 0 else 1.0
        return take(self, step, number, timer, scale=factor, **options)

    patch.setattr(LanePasses, "take", faulty)


@pytest.fixture
def copied(plan: RunPlan, tmp_path: Path) -> Storage:
    """A copy of the run and of its store, to be spoiled."""
    shutil.copytree(plan.config.storage.uri, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def planted_turn(plan: RunPlan) -> dict[str, Any]:
    """Returns a step that has a whole row of the planted document and no other row of it, and beside
    that in the lane, a row of several documents: once the model knows the other texts."""
    num_rows = Counter(turn["step"] for turn in planted_turns(plan))
    for turn in planted_turns(plan):
        rows = where(plan.run, step=turn["step"]).json()["rows"]
        (beside,) = (
            row for row in rows if row["lane"] == turn["lane"] and row["sample"] != turn["sample"]
        )
        if num_rows[turn["step"]] == 1 and turn["tokens"] > 12 and len(beside["documents"]) > 1:
            return turn
    raise AssertionError("no step is as the tests mean it")


def planted_turns(plan: RunPlan) -> list[dict[str, Any]]:
    (document,) = where(plan.run, document=PLANTED).json()["documents"]
    return [turn for turn in document["turns"] if turn["step"] > LEARNED]


def line_of(plan: RunPlan, step: int) -> Line:
    return next(line for line in Ledger.read(plan.run).steps if line["step"] == step)


def files_of(run: Storage) -> dict[str, bytes]:
    return {entry.key: run.read_bytes(entry.key) for entry in run.list()}


@pytest.mark.more
def test_the_planted_document_is_named_with_its_lane_and_row(plan: RunPlan) -> None:
    turn = planted_turn(plan)
    result = explain(plan.run, turn["step"]).json()
    worst = result["worst"][0]
    assert worst["highest"][0] == "loss"
    assert (worst["lane"], worst["sample"]) == (turn["lane"], turn["sample"])
    first_sample = result["rows"][0]["sample"]
    assert worst["lane"] * 2 + worst["row"] == turn["sample"] - first_sample, "two rows a lane"
    document = worst["documents"][0]
    assert document["file"].endswith(f"/{PLANTED}")
    assert document["place"] == 0
    assert document["loss"] > worst["loss"] or len(worst["documents"]) == 1
    others = [row["loss"] for row in result["rows"] if row["sample"] != worst["sample"]]
    assert worst["loss"] > 1.5 * median(others)
    assert result["stands_out"]
    name = re.escape(f"lane {worst['lane']}, row {worst['row']}: {document['file']}:0")
    assert re.search(rf"from {name} \(\"\S+\"\); without it", result["verdict"])


def test_figures_are_those_of_the_run_and_add_up(plan: RunPlan) -> None:
    turn = planted_turn(plan)
    result, line = explain(plan.run, turn["step"]).json(), line_of(plan, turn["step"])
    assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"]), "to the bit"
    assert result["note"] is None
    lanes = result["lanes"]
    assert sum(lane["part"] for lane in lanes) == pytest.approx(line["loss"], rel=1e-6)
    assert len(lanes) > 1
    # A gradient is no longer than its parts together
    weights = [lane["tokens"] / result["tokens"] for lane in lanes]
    longest = sum(weight * lane["grad_norm"] for weight, lane in zip(weights, lanes, strict=True))
    assert line["grad_norm"] <= longest * (1 + 1e-5)
    for lane in lanes:
        rows = [row for row in result["rows"] if row["lane"] == lane["lane"]]
        assert len(rows) == 2
        total = sum(row["loss"] * row["tokens"] for row in rows)
        assert total / lane["tokens"] == pytest.approx(lane["loss"], rel=1e-5)
    worst = result["worst"][0]
    parts = sum(document["loss"] * document["tokens"] for document in worst["documents"])
    assert parts == pytest.approx(worst["loss"] * worst["tokens"], rel=1e-5)


def test_without_the_row_the_step_is_that_of_the_others(plan: RunPlan) -> None:
    result = explain(plan.run, planted_turn(plan)["step"]).json()
    worst = result["worst"][0]
    without = worst["without_row"]
    others = [row for row in result["rows"] if row["sample"] != worst["sample"]]
    tokens = sum(row["tokens"] for row in others)
    expected = sum(row["loss"] * row["tokens"] for row in others) / tokens
    assert without["tokens"] == tokens == result["tokens"] - worst["tokens"]
    assert without["loss"] == pytest.approx(expected, rel=1e-5), "the other rows' losses stay"
    assert without["loss"] < result["loss"]
    assert (worst["document_rows"], worst["without_document"]) == (1, without)
    assert without["update_change"] > 0.01
    assert -1 < without["update_cosine"] < 0.9999
    remaining = [lane for lane in result["lanes"] if lane["lane"] != worst["lane"]]
    lane_tokens = sum(lane["tokens"] for lane in remaining)
    lane_loss = sum(lane["loss"] * lane["tokens"] for lane in remaining) / lane_tokens
    assert worst["without_lane"]["loss"] == pytest.approx(lane_loss, rel=1e-5)


def test_without_a_document_of_several_rows_none_of_them_counts(plan: RunPlan) -> None:
    num_rows = Counter(turn["step"] for turn in planted_turns(plan))
    step, count = num_rows.most_common(1)[0]
    assert count > 1
    result = explain(plan.run, step).json()
    worst = result["worst"][0]
    assert worst["document_rows"] == count
    assert f", which has {count} rows of the step" in result["verdict"]
    held = [turn["sample"] for turn in planted_turns(plan) if turn["step"] == step]
    others = [row for row in result["rows"] if row["sample"] not in held]
    tokens = sum(row["tokens"] for row in others)
    expected = sum(row["loss"] * row["tokens"] for row in others) / tokens
    without = worst["without_document"]
    assert without["tokens"] == tokens
    assert without["loss"] == pytest.approx(expected, rel=1e-5)
    assert without["loss"] < worst["without_row"]["loss"] < result["loss"]


def test_the_run_is_not_touched_but_for_its_report(plan: RunPlan) -> None:
    step = planted_turn(plan)["step"]
    pages = {f"report/explain-{step}.html", f"report/explain-{step}.png"}
    before = {name: text for name, text in files_of(plan.run).items() if name not in pages}
    result = explain(plan.run, step).json()
    after = files_of(plan.run)
    assert after.keys() == before.keys() | pages
    assert {name: after[name] for name in before} == before
    assert after[f"report/explain-{step}.png"].startswith(b"\x89PNG")
    page = after[f"report/explain-{step}.html"].decode()
    assert PLANTED in page
    assert result["html"] == f"{plan.run.uri}/report/explain-{step}.html"


def test_the_first_step_has_no_checkpoint_before_it(plan: RunPlan) -> None:
    for step in (1, 2):
        result, line = explain(plan.run, step).json(), line_of(plan, step)
        assert result["from_checkpoint"] is None
        assert "no row stands out" in result["verdict"], "the model knows nothing yet"
        assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"])


def test_of_a_skipped_step_it_is_said_whether_its_data_is_the_cause(plan: RunPlan) -> None:
    result = explain(plan.run, SKIPPED).json()
    assert result["outcome"] == "skipped"
    assert f"step {SKIPPED} (skipped)" in result["verdict"]
    assert result["note"].startswith("the ledger says: loss nan")
    assert result["note"].endswith("the step is sound, so its data is not the cause")


def test_a_fault_that_comes_again_is_shown_where_it_is(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, SKIPPED)
    result = explain(plan.run, SKIPPED).json()
    assert result["note"] == f"the ledger says: {result['guard']}"
    assert result["guard"] == "loss nan, gradient norm nan"
    assert [lane["lane"] for lane in result["lanes"] if lane["loss"] is None] == [0]
    assert result["worst"][-1]["lane"] == 0
    assert "loss not finite" in result["verdict"]
    assert "the largest gradient is that of lane 0, row " in result["verdict"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.more
def test_steps_around_a_rollback_are_explained(plan: RunPlan) -> None:
    assert Ledger.read(plan.run).rollbacks == (WINDOW,)
    rolled_back = explain(plan.run, WINDOW[0] + 1).json()
    lines = [line for line in Ledger.read(plan.run).lines if "event" not in line]
    (line,) = (line for line in lines if line["step"] == WINDOW[0] + 1)
    assert rolled_back["outcome"] == "rolled back"
    assert (rolled_back["loss"], rolled_back["grad_norm"]) == (line["loss"], line["grad_norm"])
    assert rolled_back["note"] is None
    assert "2 bad steps in a row" in str(explain(plan.run, WINDOW[1]).note)
    behind, line = explain(plan.run, WINDOW[1] + 1).json(), line_of(plan, WINDOW[1] + 1)
    assert (behind["loss"], behind["grad_norm"]) == (line["loss"], line["grad_norm"])
    assert behind["from_checkpoint"].startswith(f"step-{WINDOW[0] - 1:09d}")


def test_without_a_map_the_rows_have_their_text(plan: RunPlan, copied: Storage) -> None:
    (listed,) = Path(copied.uri).parents[1].glob(f"tokens/*/{DOCUMENTS}")
    listed.unlink()
    result = explain(copied, planted_turn(plan)["step"]).json()
    assert "`raymill tokenize --documents`" in result["no_documents"]
    worst = result["worst"][0]
    assert worst["documents"] == []
    planted = (Path(plan.config.data.source[0]) / PLANTED).read_text()
    shared = {*worst["text"]} & {*planted}
    assert len(shared) > 3
    assert f'lane {worst["lane"]}, row {worst["row"]} ("' in result["verdict"]


@pytest.mark.more
def test_people_and_programs_read_the_explanation(
    plan: RunPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    step = planted_turn(plan)["step"]
    arguments = ["explain", "tiny", "--step", str(step), "--storage.uri", plan.config.storage.uri]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert result["verdict"] in text
    assert re.search(r"\nlane +loss +part +grad_norm +tokens\n", text)
    assert "the step without the row" in text


def test_a_step_that_was_not_taken_is_refused(plan: RunPlan) -> None:
    with pytest.raises(ConfigError, match=r"has steps 1 to"):
        explain(plan.run, 0)
    with pytest.raises(ConfigError, match=r"has steps 1 to"):
        explain(plan.run, 1000)


def test_what_has_no_lanes_or_no_data_is_refused(copied: Storage) -> None:
    ledger = Ledger.read(copied)
    other = ledger.events("start")[0] | {"data_identity": "0" * 64}
    lines = [other, *ledger.steps[:2], *ledger.lines]
    first = ledger.steps[0]["step"]
    kept = [line for line in lines[3:] if line.get("step") != first or "event" in line]
    text = "".join(json.dumps(line) + "\n" for line in [*lines[:3], *kept])
    copied.write_bytes(LEDGER, text.encode())
    with pytest.raises(UserError, match="step 1 was taken on another token store"):
        explain(copied, 1)
    change_setting(copied, exact=False)
    with pytest.raises(UserError, match=r"train\.exact: false, so its steps have no lanes"):
        explain(copied, 3)


def num_uneven(plan: RunPlan, step: int) -> int:
    """Returns how many different numbers of tokens the rows of a step count."""
    _, targets = open_stream(plan).samples(batch_schedule(plan.config).samples(step))
    counts = (targets != IGNORE_INDEX).sum(1)
    return len({*counts[counts > 0].tolist()})


@pytest.mark.more
def test_rows_and_lanes_agree_for_conversations_with_dropout_in_bf16(tmp_path: Path) -> None:
    """Lanes of two micro-batches, of whose rows some count more tokens than others."""
    file = write_conversations(tmp_path / "texts" / "chat.jsonl")
    settings = {
        "max_tokens": 1600,
        "micro_batch_size": 1,
        "micro_batches_per_lane": 2,
        "precision": "bf16",
        "optimizer": "muon",
        "document_mask": True,
    }
    data = {"source": [str(file)], "format": "chat"}
    made = mapped_plan(tmp_path, train=settings, data=data)
    model = replace(made.config.model, dropout=0.2)
    plan = replace(made, config=made.config.model_copy(update={"model": model}))
    plan.run.write_bytes("config.yaml", to_yaml(plan.config).encode())
    train(plan, rank=0, world_size=1)
    step = max(
        (line["step"] for line in Ledger.read(plan.run).steps), key=partial(num_uneven, plan)
    )
    result, line = explain(plan.run, step).json(), line_of(plan, step)
    assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"])
    parts = sum(lane["part"] for lane in result["lanes"])
    assert parts == pytest.approx(line["loss"], rel=1e-6)
    assert len({row["tokens"] for row in result["rows"]}) > 1
    for lane in result["lanes"]:
        rows = [row for row in result["rows"] if row["lane"] == lane["lane"]]
        total = sum(row["loss"] * row["tokens"] for row in rows)
        assert total == pytest.approx(lane["loss"] * lane["tokens"], rel=1e-4)
    worst = result["worst"][0]
    others = [row for row in result["rows"] if row["sample"] != worst["sample"]]
    total = sum(row["loss"] * row["tokens"] for row in others)
    without = worst["without_row"]
    assert without["tokens"] == sum(row["tokens"] for row in others)
    assert total == pytest.approx(without["loss"] * without["tokens"], rel=1e-4)


@pytest.mark.more
def test_a_rolled_back_step_is_explained_where_those_before_it_were_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints from step 6 on come too late for the rollback, which therefore goes back
    further; the steps from there are taken again, with checkpoints that know what was left out."""
    plan = planted_plan(tmp_path)
    publish, save = Publisher.publish, CheckpointWriter.save
    begun: set[str] = set()

    def publish_late(
        self: Publisher, folder: Path, metadata: Metadata, hashes: StateHashes
    ) -> Published:
        begun.add(folder.name)
        if metadata.step == 6:
            wait_until(lambda: Ledger.read(plan.run).rollbacks)
        return publish(self, folder, metadata, hashes)

    def save_in_turn(self: CheckpointWriter, metadata: Metadata, *rest: Any, must: bool) -> bool:
        is_saved = save(self, metadata, *rest, must=must)
        if metadata.step <= 6 or Ledger.read(plan.run).rollbacks:  # else the next would replace it
            wait_until(lambda: checkpoint_name(metadata.step, metadata.generation) in begun)
        return is_saved

    monkeypatch.setattr(Publisher, "publish", publish_late)
    monkeypatch.setattr(CheckpointWriter, "save", save_in_turn)
    train_poisoned(plan)
    lines = [line for line in Ledger.read(plan.run).lines if "event" not in line]
    assert Counter(line["step"] for line in lines)[WINDOW[0] - 1] == 2
    result = explain(plan.run, WINDOW[0] + 1).json()
    assert result["from_checkpoint"] == "step-000000012-0002"
    (line,) = (line for line in lines if line["step"] == WINDOW[0] + 1)
    assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"])
