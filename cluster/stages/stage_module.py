"""The contract of modules that `stage.py` runs as Ray jobs: stage names, the line that carries a
result, exit codes."""

import json
import signal
import sys
from types import FrameType
from typing import Any

from cluster.output.result_text import forget_closed_terminal
from raymill.errors import UserError

STAGES = {
    "tokenize": "jobs.tokenize_corpus",
    "pretrain": "jobs.pretrain",
    "pipeline": "jobs.pipeline",
}
"""The module of each stage that can be submitted."""

MAY_SUCCEED = 1
"""Exit code of a module that another attempt may bring to its end."""

MISUSED = 2
"""Exit code of a module that was called wrongly."""

HOPELESS = 3
"""Exit code of a module that would fail again: only its user can mend the cause."""

OVER_BUDGET = 4
"""Exit code of a run that has cost what it may: it is saved, and only its user can let it go on."""

FINAL = (MISUSED, HOPELESS, OVER_BUDGET)
"""Exit codes that another attempt with the same settings would end with too."""

RESULT_MARK = "raymill-result: "

ERROR_MARK = "error: "
"""Prefix of the line in which a module says why it ends."""


def stage_name(module: str) -> str:
    """Returns the name of the stage that a module is; another module is called by its own."""
    return next(
        (name for name, its_module in STAGES.items() if its_module == module),
        module.rpartition(".")[2],
    )


class StageFailedError(UserError):
    """A stage ended without a result; its own log says why. `exit_code` says whether another attempt
    may succeed."""

    def __init__(self, message: str, *, exit_code: int = MAY_SUCCEED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OverBudgetError(StageFailedError):
    """A run has cost what `scaling.max_cost` allows."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=OVER_BUDGET)


def parse_result(line: str) -> dict[str, Any] | None:
    """Returns the result in a line of a module's output, or None if the line has none."""
    return json.loads(line[len(RESULT_MARK) :]) if line.startswith(RESULT_MARK) else None


ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end: Ctrl-C, another process, and a terminal that is closed."""


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Handles a signal by an exit, on whose way out contexts stop what they started."""
    signal.signal(number, signal.SIG_IGN)  # once is enough
    forget_closed_terminal()
    sys.exit(128 + number)  # as a shell reports it
