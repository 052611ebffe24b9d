"""The launcher's eye on a finished run: what it says, draws and annotates is what the ledger tells,
once."""

from pathlib import Path

import pytest

from cluster.storage.uris import open_storage
from jobs.report.why_slow import why_slow
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.ledger_chain import encoded
from jobs.run.storage_retry import not_stored
from jobs.watching.run_metrics import RunFigures
from jobs.watching.run_watcher import watching
from tests.cluster.grafana_stub import grafana_stub
from tests.jobs.runs import trained_run
from tests.jobs.watching.eventful_ledger import events_of


def test_an_outage_of_the_storage_is_told_when_it_begins_and_when_it_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the terminal, in the metrics, in `why-slow` and in the words of `status`."""
    plan = trained_run(str(tmp_path))
    trained = [line for line in Ledger.read(plan.run).lines if line.get("event") != "finish"]
    down = {"event": "storage_down", "time": 1.0, "what": "checkpoints", "reason": "/d: disk full"}
    mirror = down | {"what": "ledger"}  # of which its writer tells
    back = {"event": "storage_back", "time": 2.0, "what": "checkpoints", "tries": 9}

    def told(lines: list[Line]) -> tuple[list[str], float, str]:
        plan.run.delete(LEDGER)
        with watching(plan, snapshot_time_s=lambda: None):
            plan.run.write_bytes(LEDGER, b"".join(encoded(line, None) + b"\n" for line in lines))
        said = [line for line in capsys.readouterr().err.splitlines() if "heckpoint" in line]
        figures = RunFigures(plan.config)
        for line in lines:
            figures.add(line)
        values = {sample.name: sample.value for sample in figures.samples()}
        return said, values["train_storage_down"], not_stored(lines)

    begun = [*trained, down, mirror]
    no_checkpoint = "no checkpoint since step 8: /d: disk full"
    first, is_down, words = told(begun)
    assert first == [f"{no_checkpoint}. Training goes on, and storing it is tried again and again"]
    assert (is_down, words) == (1.0, no_checkpoint)
    assert f" And {no_checkpoint}." in why_slow(Ledger(begun)).verdict
    over = ["checkpoints are stored again, after 9 failed tries"]
    assert told([*begun, back]) == (first + over, 0.0, "")


def test_a_run_is_told_of_and_annotated_once_however_often_it_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = trained_run(str(tmp_path))
    with grafana_stub() as grafana:
        monkeypatch.setenv("GRAFANA_URL", grafana.url)
        monkeypatch.setenv("GRAFANA_TOKEN", grafana.token)
        ledger = plan.run.read_bytes(LEDGER)
        plan.run.delete(LEDGER)
        with watching(plan, snapshot_time_s=lambda: None):
            plan.run.write_bytes(LEDGER, ledger)
        said = capsys.readouterr().err
        assert (
            "attempt 1: 1 worker, from step 0" in said and '"label": "training", "done": 8' in said
        )
        # A later launch, which finds these lines there
        with watching(plan, snapshot_time_s=lambda: None):
            pass
        said = capsys.readouterr().err
        assert "attempt 1" not in said and '"label": "training", "done": 8' in said
    assert [(note["tags"][1], note["text"]) for note in grafana.annotations] == [
        ("checkpoint", "checkpoint after step 3"),
        ("checkpoint", "checkpoint after step 6"),
        ("checkpoint", "checkpoint after step 8"),
        ("end", "finish after step 8"),
    ]
    assert {note["tags"][2] for note in grafana.annotations} == {"run:tiny"}
    events = [line for line in Ledger.read(plan.run).events() if line["event"] == "checkpoint"]
    assert [note["time"] for note in grafana.annotations[:3]] == [
        round(1000 * line["time"]) for line in events
    ]
    curve = {
        event.step: value.simple_value
        for event in events_of(open_storage(plan.run.uri))
        for value in event.summary.value
        if value.tag == "train/loss"
    }
    assert curve == pytest.approx(
        {line["step"]: line["loss"] for line in Ledger.read(plan.run).steps}
    )
