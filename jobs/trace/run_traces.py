"""The process that traces texts beside an endpoint's replica: each line is a question and gets a
line. It ends when its replica does."""

import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import orjson

from jobs.trace.checkpoint_trace import (
    Checkpoint,
    CheckpointTrace,
    Limits,
    LineageError,
    Question,
    RefusedError,
)
from raymill.errors import UserError

LOW_PRIORITY = 10  # gets a tenth of a core that the engine wants too
MEMORY_BYTES = 2 << 30  # of its own; files that are mapped do not count


def answer_line(line: bytes, opened: Callable[[], CheckpointTrace]) -> tuple[int, dict[str, Any]]:
    """Returns the status of a question, and its answer or what is wrong. An empty object only asks
    whether there are answers."""
    try:
        trace, question = opened(), json.loads(line)
        return 200, trace.answer(Question(**question)) if question else {}
    except RefusedError as error:
        return 400, {"message": str(error), "param": error.param}
    except LineageError as error:
        return 409, {"message": str(error)}
    except UserError as error:
        return 503, {"message": str(error)}


def main() -> int:
    args = json.loads(sys.argv[1])  # see `Trace`
    os.nice(LOW_PRIORITY)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    connection = socket.socket(fileno=args["socket"])

    @cache
    def opened() -> CheckpointTrace:
        return CheckpointTrace(
            Checkpoint(**args["checkpoint"]),
            Limits(**args["limits"]),
            store_uri=args["store"],
            storage_uri=args["storage"],
        )

    with contextlib.suppress(ConnectionError), connection.makefile("rb") as lines:
        for line in lines:
            status, body = answer_line(line, opened)
            connection.sendall(b"%d %b\n" % (status, orjson.dumps(body)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
