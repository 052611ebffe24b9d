"""Runs the tasks of an index in this process, or in several of this machine."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import psutil

from jobs.corpus.ray_data_tasks import Result
from model.errors import UserError


@dataclass(frozen=True)
class LocalTasks:
    """Does what `run_tasks` does on a cluster."""

    num_processes: int = 1

    def __call__(
        self, items: Sequence[Any], work: Callable[[Any], bytes], /
    ) -> Iterator[Result[Any]]:
        """Yields results in the order in which tasks finish. Raises `UserError` where a process
        dies."""
        if self.num_processes == 1:
            yield from (_done(item, work) for item in items)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # once, not in each process
        with ProcessPoolExecutor(self.num_processes, mp_context=context) as pool:
            tasks = [pool.submit(_done, item, work) for item in items]
            try:
                for task in as_completed(tasks):
                    yield task.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"one of {self.num_processes} processes died, perhaps for want of memory; take "
                    "fewer (--workers), and run it again: what is finished is kept"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _done(item: Any, work: Callable[[Any], bytes]) -> Result[Any]:
    content = work(item)
    return Result(item, content, psutil.Process().memory_info().rss)
