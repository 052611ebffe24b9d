"""Runs many independent tasks on the cluster with Ray Data: one CPU each, results as they come,
clear errors."""

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import psutil
import ray.data
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from ray.util.annotations import RayDeprecationWarning

from jobs.corpus.chunks import Chunk
from raymill.errors import UserError

_WORKER_DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
_MAX_RETRIES = 3  # Ray Data would retry a file that crashes its reader forever


Item = TypeVar("Item")


@dataclass(frozen=True)
class Result(Generic[Item]):
    item: Item
    content: bytes
    rss_bytes: int  # resident memory of the worker


Runner = Callable[[Sequence[Any], Callable[[Any], bytes]], Iterator[Result[Any]]]
"""Does the work on each item: `run_tasks` on a cluster, or another one without."""


def run_tasks(items: Sequence[Item], work: Callable[[Item], bytes]) -> Iterator[Result[Item]]:
    """Does the work on each item in a task, and yields the results in the order in which tasks
    finish.

    A task whose worker or node dies is run again, but only a few times, since the task itself may
    be the killer. An error in a task stops all of them; that of a `UserError` keeps its text.
    `work` is pickled by name, so its module must not be run as a script.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
    rows = [{"place": place, "item": pickle.dumps(item)} for place, item in enumerate(items)]
    made = ray.data.from_items(rows, override_num_blocks=len(rows))
    perform = partial(_perform, work=work)
    with warnings.catch_warnings():
        # There is no other way to set `max_retries`
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = made.map_batches(
            perform, batch_size=1, batch_format="numpy", num_cpus=1, max_retries=_MAX_RETRIES
        )
    unfinished = dict(enumerate(items))
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield Result(unfinished.pop(row["place"]), row["content"], row["rss_bytes"])
    except _WORKER_DEATHS as error:
        raise UserError(_fatal(list(unfinished.values()))) from error


def _fatal(items: Sequence[Any]) -> str:
    uris = [part.file.uri for item in items if isinstance(item, Chunk) for part in item.parts]
    if not uris:
        return f"a worker died each time at one of {len(items)} tasks; give the workers more memory"
    return (
        f"a worker died each time at one of {len(uris)} files, {', '.join(uris[:3])} first; such a file crashes "
        "its reader or needs more memory than there is: find it with `raymill data preview` and take it out of "
        "data.source"
    )


def _perform(batch: dict[str, Any], *, work: Callable[[Any], bytes]) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task owns one CPU
    content, problem = b"", ""
    try:
        content = work(pickle.loads(batch["item"][0]))  # noqa: S301 (the driver has pickled it)
    except UserError as error:
        # A value, because Ray Data wraps an exception in its own and loses the one inside
        problem = str(error)
    rss_bytes = psutil.Process().memory_info().rss
    return {
        "place": batch["place"],
        "content": [content],
        "rss_bytes": [rss_bytes],
        "error": [problem],
    }
