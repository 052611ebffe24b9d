"""Every kept checkpoint of a real run is probed, and drawn."""

from pathlib import Path

import pytest

from cluster.storage.uris import open_storage
from jobs.report.probe_run import probe_run
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from model.insight.probes import TASKS
from raymill.errors import UserError
from tests.jobs.report.eventful_run import eventful_lines, write_run
from tests.jobs.runs import trained_run


def test_every_kept_checkpoint(tmp_path: Path) -> None:
    run = trained_run(str(tmp_path)).run
    found = probe_run(run)
    assert [line["step"] for line in found["checkpoints"]] == [
        int(name.split("-")[1]) for name in RunCheckpoints(run).names
    ]
    last = found["checkpoints"][-1]
    assert last["val_loss"] == Ledger.read(run).events("validation")[-1]["val_loss"]
    assert all(0 <= last[name] <= 1 for name in TASKS)
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path)).child("runs/eventful")
    write_run(run, eventful_lines()[:20])
    with pytest.raises(UserError, match="keeps no checkpoint yet"):
        probe_run(run)
