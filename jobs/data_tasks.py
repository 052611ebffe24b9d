"""Many independent tasks on the cluster with Ray Data: one CPU each, results as they come, clear errors."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray.data

from model.errors import UserError

Task = dict[str, Any]
"""What to do, as JSON values."""

Work = Callable[[Task], Iterator[bytes]]
"""Does a task and yields its results."""


@dataclass(frozen=True)
class Result:
    number: int  # of the task
    content: bytes
    rss_bytes: int  # resident memory of the worker


def run_tasks(tasks: list[Task], work: Work) -> Iterator[Result]:
    """Every result, in the order in which tasks get ready.

    A task whose worker or node dies is run again; an error in it stops all, as the `UserError` that it is if it is
    one. `work` is sent by name: it lives in a module that is not run as a script.
    """
    if not tasks:
        return
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
        yield Result(row["number"], row["content"], row["rss_bytes"])


def _perform(batch: dict[str, Any], *, work: Work) -> Iterator[dict[str, Any]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task owns one CPU
    row = {"number": [int(batch["number"][0])], "content": [b""], "rss_bytes": [0], "error": [""]}
    try:
        for content in work(json.loads(batch["task"][0])):
            yield row | {"content": [content], "rss_bytes": [psutil.Process().memory_info().rss]}
    except UserError as error:
        # As a value, because Ray Data wraps an exception in its own and loses the one inside.
        yield row | {"error": [str(error)]}
