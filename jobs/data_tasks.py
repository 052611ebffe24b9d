"""Many independent tasks on the cluster with Ray Data: one CPU each, results as they come, clear errors."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray.data

from model.errors import UserError

Task = dict[str, Any]
"""What to do, as JSON values."""

Work = Callable[[Task], Iterator[bytes]]
"""Does a task and yields its results, part by part."""


def run_tasks(tasks: list[Task], work: Work) -> Iterator[tuple[int, int, bytes]]:
    """(task number, part number, result) of every part, in the order in which tasks get ready.

    A task whose worker or node dies is run again; an error in it stops all, as the `UserError` that it is if it is
    one. `work` is sent by name: it lives in a module that is not run as a script.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"number": number, "task": json.dumps(task)} for number, task in enumerate(tasks)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(_perform, work=work), batch_size=1, batch_format="numpy", num_cpus=1
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row["number"], row["part"], row["result"]


def _perform(batch: dict[str, Any], *, work: Work) -> Iterator[dict[str, Any]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task owns one CPU
    number = int(batch["number"][0])
    part = 0
    try:
        for part, result in enumerate(work(json.loads(batch["task"][0]))):
            yield {"number": [number], "part": [part], "result": [result], "error": [""]}
    except UserError as error:
        # As a value, because Ray Data wraps an exception in its own and loses the one inside.
        yield {"number": [number], "part": [part], "result": [b""], "error": [str(error)]}
