"""Modules that run as `python -m MODULE`: the stages' names, the line that carries a result, and the exit code.

`stage.py` runs one as a Ray job, `module_process.py` beside this process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from cluster.parser import ConfigError
from cluster.printable import printable
from model.errors import UserError

STAGES = {
    "tokenize": ("jobs.tokenize_corpus", "corpus to token shards"),
    "pretrain": ("jobs.pretrain", "token shards to a trained, published checkpoint; makes the shards where missing"),
    "pipeline": ("jobs.pipeline", "corpus to evaluated checkpoint and report, all stages in one job"),
}
"""What can be submitted: the module of each stage, and what it does."""

MISUSED = 2
"""The exit code of a module that was called wrongly."""

RESULT_MARK = "raymill-result: "

ERROR_MARK = "error: "
"""Begins the line by which a module says why it ends."""


class StageFailedError(UserError):
    """A stage ended without a result; its own log said why."""


class ModuleFailedError(StageFailedError):
    """A module run beside this process failed and has said why."""


class ModuleMisusedError(ModuleFailedError, ConfigError):
    """It found itself misused."""


def parse_result(line: str) -> dict[str, Any] | None:
    """Returns the result that a line of a module's output carries, if it is that line."""
    return json.loads(line[len(RESULT_MARK) :]) if line.startswith(RESULT_MARK) else None


def print_result(
    compute: Callable[[], dict[str, Any]], *, is_good: Callable[[dict[str, Any]], bool] = lambda result: True
) -> int:
    """Prints the result in the line that `parse_result` knows, or the error for the user; returns the exit code, which
    is 1 for a result that is not good too."""
    try:
        result = compute()
    except UserError as error:
        sys.stderr.write(f"{ERROR_MARK}{printable(str(error))}\n")
        return MISUSED if isinstance(error, ConfigError) else 1
    sys.stdout.write(f"{RESULT_MARK}{json.dumps(result)}\n")
    return 0 if is_good(result) else 1
