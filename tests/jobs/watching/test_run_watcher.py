"""The launcher's eye on a finished run: what it says, draws and annotates is what the ledger tells,
once."""

from pathlib import Path

import pytest

from cluster.storage.uris import open_storage
from jobs.run.ledger import LEDGER, Ledger
from jobs.watching.run_watcher import watching
from tests.cluster.grafana_stub import grafana_stub
from tests.jobs.runs import trained_run
from tests.jobs.watching.eventful_ledger import events_of


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
