"""`raymill explain` of real runs: a document that was planted is named with its lane and row, and the
figures are those of the run."""

import json
import random
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from torch import Tensor

from cluster.cli import main
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage, open_storage
from jobs.exact.batch_gradient import BatchGradient
from jobs.proof.explain_step import explain
from jobs.proof.where_run import where
from jobs.run.ledger import Ledger, Line
from jobs.run.run_plan import RunPlan
from jobs.tokens.document_map import DOCUMENTS
from jobs.training.train_loop import train
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.runs import make_text

SKIPPED = 6
"""The step whose loss a fault of the machine makes NaN."""

LEARNED = 20
"""A step after which the model knows the letters of the other texts."""

PLANTED = "planted.txt"


def write_texts(folder: Path) -> Path:
    """Writes texts of few letters, and one of characters that no other has."""
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(make_text(60, seed=number))
    planted = "".join(random.Random(0).choices([chr(0x4E00 + code) for code in range(999)], k=12))
    (folder / PLANTED).write_text(planted)
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run to its end, with one step that is skipped."""
    folder = tmp_path_factory.mktemp("planted")
    data = {"source": [str(write_texts(folder / "texts"))], "val_fraction": 0.1}
    train_settings = {"max_tokens": 9000, "document_mask": True}
    plan = mapped_plan(folder, data=data, train=train_settings)
    backward = BatchGradient._backward

    def faulty(
        self: BatchGradient, loss_of: Any, step: int, number: int, *rest: Any, scale: float
    ) -> Tensor:
        if (step, number) == (SKIPPED, 0):
            scale = float("nan")
        return backward(self, loss_of, step, number, *rest, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchGradient, "_backward", faulty)
        train(plan, rank=0, world_size=1)
    return plan


@pytest.fixture
def copied(plan: RunPlan, tmp_path: Path) -> Storage:
    """A copy of the run and of its store, to be spoiled."""
    shutil.copytree(plan.config.storage.uri, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def planted_turn(plan: RunPlan) -> dict[str, Any]:
    """Returns the step with most of the planted document, once the model knows the other texts."""
    (document,) = where(plan.run, document=PLANTED)["documents"]
    turns: list[dict[str, Any]] = [turn for turn in document["turns"] if turn["step"] > LEARNED]
    return max(turns, key=lambda turn: turn["tokens"])


def line_of(plan: RunPlan, step: int) -> Line:
    return next(line for line in Ledger.read(plan.run).steps if line["step"] == step)


def files_of(run: Storage) -> dict[str, bytes]:
    return {entry.key: run.read_bytes(entry.key) for entry in run.list()}


def test_the_planted_document_is_named_with_its_lane_and_row(plan: RunPlan) -> None:
    turn = planted_turn(plan)
    result = explain(plan.run, turn["step"])
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
    result, line = explain(plan.run, turn["step"]), line_of(plan, turn["step"])
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
    result = explain(plan.run, planted_turn(plan)["step"])
    worst = result["worst"][0]
    without = worst["without_row"]
    others = [row for row in result["rows"] if row["sample"] != worst["sample"]]
    tokens = sum(row["tokens"] for row in others)
    expected = sum(row["loss"] * row["tokens"] for row in others) / tokens
    assert without["tokens"] == tokens == result["tokens"] - worst["tokens"]
    assert without["loss"] == pytest.approx(expected, rel=1e-5), "the other rows' losses stay"
    assert without["loss"] < result["loss"]
    assert without["update_change"] > 0.01
    assert -1 < without["update_cosine"] < 0.9999
    remaining = [lane for lane in result["lanes"] if lane["lane"] != worst["lane"]]
    lane_tokens = sum(lane["tokens"] for lane in remaining)
    lane_loss = sum(lane["loss"] * lane["tokens"] for lane in remaining) / lane_tokens
    assert worst["without_lane"]["loss"] == pytest.approx(lane_loss, rel=1e-5)


def test_the_run_is_not_touched_but_for_its_report(plan: RunPlan) -> None:
    step = planted_turn(plan)["step"]
    pages = {f"report/explain-{step}.html", f"report/explain-{step}.png"}
    before = {name: text for name, text in files_of(plan.run).items() if name not in pages}
    result = explain(plan.run, step)
    after = files_of(plan.run)
    assert after.keys() == before.keys() | pages
    assert {name: after[name] for name in before} == before
    assert after[f"report/explain-{step}.png"].startswith(b"\x89PNG")
    page = after[f"report/explain-{step}.html"].decode()
    assert PLANTED in page
    assert result["html"] == f"{plan.run.uri}/report/explain-{step}.html"


def test_the_first_step_has_no_checkpoint_before_it(plan: RunPlan) -> None:
    for step in (1, 2):
        result, line = explain(plan.run, step), line_of(plan, step)
        assert result["from_checkpoint"] is None
        assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"])


def test_of_a_skipped_step_it_is_said_whether_its_data_is_the_cause(plan: RunPlan) -> None:
    result = explain(plan.run, SKIPPED)
    assert result["outcome"] == "skipped"
    assert f"step {SKIPPED} (skipped)" in result["verdict"]
    assert result["note"].startswith("the ledger says: loss nan")
    assert result["note"].endswith("the step is sound, so its data is not the cause")


def test_a_step_that_was_rolled_back_is_explained(plan: RunPlan, copied: Storage) -> None:
    """The ledger is given the rollback that a guard would have written."""
    last = Ledger.read(copied).steps[-1]["step"]
    event = {"event": "rollback", "step": last, "first": last - 1, "last": last, "reason": "tried"}
    copied.write_bytes(
        "ledger.jsonl", copied.read_bytes("ledger.jsonl") + json.dumps(event).encode() + b"\n"
    )
    result, line = explain(copied, last - 1), line_of(plan, last - 1)
    assert result["outcome"] == "rolled back"
    assert (result["loss"], result["grad_norm"]) == (line["loss"], line["grad_norm"])
    assert result["note"] is None


def test_without_a_map_the_rows_have_their_text(plan: RunPlan, copied: Storage) -> None:
    (listed,) = Path(copied.uri).parents[1].glob(f"tokens/*/{DOCUMENTS}")
    listed.unlink()
    result = explain(copied, planted_turn(plan)["step"])
    assert "`raymill tokenize --documents`" in result["no_documents"]
    worst = result["worst"][0]
    assert worst["documents"] == []
    planted = (Path(plan.config.data.source[0]) / PLANTED).read_text()
    shared = {*worst["text"]} & {*planted}
    assert len(shared) > 3
    assert f'lane {worst["lane"]}, row {worst["row"]} ("' in result["verdict"]


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
