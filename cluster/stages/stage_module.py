"""Modules that `stage.py` runs as Ray jobs: the stages' names, the line that carries a result, and the exit code."""

import json
import sys
from collections.abc import Callable
from typing import Any

from cluster.output.result_text import printable
from cluster.settings.parser import ConfigError
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


class ShownError(UserError):
    """What a command looked at is not as it should be, and the result that it has shown says so."""


def parse_result(line: str) -> dict[str, Any] | None:
    """Returns the result that a line of a module's output carries, if it is that line."""
    return json.loads(line[len(RESULT_MARK) :]) if line.startswith(RESULT_MARK) else None


def print_result(compute: Callable[[], dict[str, Any]]) -> int:
    """Prints the result in the line that `parse_result` knows, or the error for the user; returns the exit code."""
    try:
        result = compute()
    except UserError as error:
        sys.stderr.write(f"{ERROR_MARK}{printable(str(error))}\n")
        return MISUSED if isinstance(error, ConfigError) else 1
    sys.stdout.write(f"{RESULT_MARK}{json.dumps(result)}\n")
    return 0
