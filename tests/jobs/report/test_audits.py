"""The report says what audits cost, what they found, and whose node was left out."""

from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import open_storage
from jobs.report.audits import audit_rows, findings
from jobs.report.make_report import make_report
from jobs.run.ledger import Ledger
from tests.jobs.report.eventful_run import Page, eventful_lines, write_run

EVERY_STEPS = 25
CORRUPTION = {
    "event": "corruption",
    "step": 225,
    "attempt": 3,
    "generation": 3,
    "measure": "left_out",
    "what": "gradient",
    "rank": 1,
    "node": "<node-2>",
    "to_step": 200,
}


def audited_lines() -> list[dict[str, Any]]:
    """The eventful run, audited every 25 steps: at step 225 a worker is wrong, and the run goes
    back to step 200, whose next line comes after 10 seconds."""
    lines: list[dict[str, Any]] = []
    late_s = 0.0
    for line in eventful_lines():
        is_step = "event" not in line
        if is_step and line["step"] % EVERY_STEPS == 0:
            line["audit_seconds"] = 0.01
            line["proven_to"] = min(line["step"] - 1, 99)
            if line["step"] > 100:
                line["not_proven_since"] = 100
        if is_step and line["step"] == 225:
            lines.append(CORRUPTION | {"time": line["time"]})
            again = [at for at in lines if 200 < at.get("step", 0) < 225 and "event" not in at]
            late_s = 10.0
            lines += [at | {"time": line["time"] + 1.0} for at in again]
            proven = {"event": "proven", "step": 220, "parameter_hash": "a", "attempt": 4}
            lines.append(proven | {"time": line["time"] + 1.0})
        lines.append(line | {"time": line["time"] + late_s})
    return lines


def test_the_report_tells_audits_and_whose_node_was_left_out(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path)).child("runs/eventful")
    write_run(run, audited_lines())
    ledger = Ledger.read(run)
    rows = dict(audit_rows(ledger))
    wall_s = sum(line["wall_s"] for line in ledger.steps)
    assert rows["Steps audited"] == "12 of 300"
    assert rows["Time of the audits"] == f"0.12 s, {0.12 / wall_s:.2%} of the steps' time"
    assert rows["Proven to"] == "step 99"
    since = "step 100: the run continued from a state that no audit had proven"
    assert rows["Not proven since"] == since
    assert rows["Workers found wrong"] == "1 time"
    assert rows["Nodes left out"] == "<node-2>"
    assert rows["Time that wrong workers cost"] == "10.0 s"
    assert [finding.line["event"] for finding in findings(ledger)] == ["corruption", "proven"]
    page = Page(Path(make_report(run)["html"]).read_text())
    assert page.value_of("Steps audited") == "12 of 300"
    first = page.cells.index("Verdict") + 4
    who = "rank 1 on <node-2>"
    assert page.cells[first : first + 5] == [
        "225",
        "corruption",
        who,
        "gradient, left out, back to step 200",
        "10.0 s",
    ]


@pytest.mark.parametrize("found", [False, True])
def test_a_run_without_audits_has_no_such_section(tmp_path: Path, *, found: bool) -> None:
    """A worker that fails its self-test is told all the same."""
    lines = eventful_lines()
    if found:
        time_s = lines[0]["time"]
        lines.insert(1, CORRUPTION | {"time": time_s, "step": 0, "to_step": None})
    run = open_storage(str(tmp_path)).child("runs/eventful")
    write_run(run, lines)
    assert bool(audit_rows(Ledger.read(run))) is found
    page = Page(Path(make_report(run)["html"]).read_text())
    assert ("Steps audited" in page.cells) is found
