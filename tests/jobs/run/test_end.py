"""How a run has ended, as its ledger says, and the exit code that follows."""

from pathlib import Path
from typing import Any

import pytest

from cluster.stages.stage_module import HOPELESS, MAY_SUCCEED
from jobs.pretrain import unfinished
from jobs.run.end import EXIT_CODES, End
from jobs.run.ledger import Ledger
from tests.jobs.runs import tiny_plan

START = {"event": "start", "step": 0}
STEP = {"step": 5}
SAVED = {"event": "preempted", "step": 5, "notice": "save"}
STOPPED = SAVED | {"notice": "stop"}
GAVE_UP = {"event": "gave_up", "step": 5, "reason": "no space is left"}
FINISHED = {"event": "finish", "step": 8}


@pytest.mark.parametrize(
    ("lines", "end"),
    [
        ([], None),
        ([START, STEP, SAVED], None),  # a node was to go, and the run went on
        ([START, STEP, STOPPED], End.STOPPED),
        ([START, STEP, STOPPED, {"event": "checkpoint", "step": 5}], End.STOPPED),
        ([START, STEP, STOPPED, START], None),  # it is continued
        ([START, STEP, STOPPED, START, STEP, GAVE_UP], End.GAVE_UP),
        ([START, GAVE_UP, START, STEP, FINISHED], End.FINISHED),
    ],
)
def test_the_last_end_counts_until_the_run_is_continued(
    lines: list[dict[str, Any]], end: End | None
) -> None:
    ledger = Ledger(lines)
    assert (ledger.end, ledger.is_finished) == (end, end is End.FINISHED)


def test_a_user_learns_how_the_run_ended_and_who_repeats_it_by_the_exit_code(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(str(tmp_path))
    stopped = unfinished(plan, Ledger([START, STEP, GAVE_UP, START, STOPPED]))
    assert "is saved at step 5 of 8 and has stopped, as requested" in str(stopped)
    gave_up = unfinished(plan, Ledger([START, STEP, STOPPED, START, GAVE_UP]))
    assert "gave up: no space is left" in str(gave_up)
    assert (stopped.exit_code, gave_up.exit_code) == (MAY_SUCCEED, HOPELESS) == (1, 3)
    assert EXIT_CODES.keys() == {*End} - {End.WENT_BACK}
