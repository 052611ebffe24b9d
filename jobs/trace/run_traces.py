"""The process that traces texts beside an endpoint's replica: each line is a question and gets a
line. It ends when its replica does."""

import json
import resource
import sys
from collections.abc import Callable
from functools import cache

import orjson

from jobs.trace.checkpoint_trace import (
    Checkpoint,
    CheckpointTrace,
    Limits,
    LineageError,
    Question,
    RefusedError,
)
from model.files.line_server import LineServer, own_arguments, with_status
from raymill.errors import UserError

LOW_PRIORITY = 10  # gets a tenth of a core that the engine wants too
MEMORY_BYTES = 2 << 30  # of its own; files that are mapped do not count


def answer_line(line: bytes, opened: Callable[[], CheckpointTrace]) -> tuple[int, bytes]:
    """Returns the status of a question, and its answer or what is wrong, as JSON. An empty object
    only asks whether there are answers."""
    try:
        trace, question = opened(), json.loads(line)
        return 200, orjson.dumps(trace.answer(Question(**question)) if question else {})
    except RefusedError as error:
        return 400, orjson.dumps({"message": str(error), "param": error.param})
    except LineageError as error:
        return 409, orjson.dumps({"message": str(error)})
    except UserError as error:
        return 503, orjson.dumps({"message": str(error)})


def main() -> int:
    args = own_arguments()  # see `Trace`
    limits = {resource.RLIMIT_DATA: MEMORY_BYTES}
    server = LineServer(args["socket"], niceness=LOW_PRIORITY, limits=limits)

    @cache
    def opened() -> CheckpointTrace:
        return CheckpointTrace(
            Checkpoint(**args["checkpoint"]),
            Limits(**args["limits"]),
            store_uri=args["store"],
            storage_uri=args["storage"],
        )

    server.serve(lambda line: with_status(*answer_line(line, opened)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
