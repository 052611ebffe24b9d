"""Memory and disk of the driver, memory of the workers and time, while the duplicates of more and
more documents are found.

The documents are short ones that exist as their indexes alone: a fifth repeats an earlier one, and
with near-duplicates a tenth resembles one; with `--crowded` it is always the same ones, whose
families grow with the corpus. So this measures what follows the index pass, on a Ray of one node.
Prints a table and, last, one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.storage.uris import open_storage
from jobs.cleaning.selection import select
from tests.benchmarks.process_meter import ProcessMeter
from tests.jobs.cleaning.in_process import store_index
from tests.local_ray import local_ray
from tests.repository import REPOSITORY

_CHUNK_DOCUMENTS = 20_000
_THRESHOLD = 0.7


def make_indexes(folder: Path, *, num_documents: int, is_near: bool, is_crowded: bool) -> None:
    """Stores the indexes of random documents; repeats and changed copies stand up to ten chunks
    after their originals."""
    store, rng = open_storage(str(folder)), np.random.default_rng(0)
    recent: list[tuple[np.ndarray, np.ndarray | None]] = []
    for number in range(num_documents // _CHUNK_DOCUMENTS):
        hashes = rng.integers(0, 256, (_CHUNK_DOCUMENTS, 16), dtype=np.uint8)
        signatures = (
            rng.integers(0, 1 << 16, (_CHUNK_DOCUMENTS, 128), dtype=np.uint16) if is_near else None
        )
        if recent:
            earlier, earlier_signatures = recent[rng.integers(len(recent))]
            places = (
                np.arange(_CHUNK_DOCUMENTS) if is_crowded else rng.permutation(_CHUNK_DOCUMENTS)
            )
            hashes[::5] = earlier[places[::5]]
            if signatures is not None and earlier_signatures is not None:
                signatures[::5] = earlier_signatures[places[::5]]
                signatures[1::10, 13:] = earlier_signatures[places[1::10], 13:]
        recent = [*recent[-9:], (hashes, signatures)]
        store_index(store, number, hashes=hashes, signatures=signatures)


def run_selection(
    folder: Path, *, num_workers: int, is_near: bool, task_mib: int
) -> dict[str, Any]:
    """Runs in a process of its own, the driver."""
    indexed = [(bytes(32), _CHUNK_DOCUMENTS)] * len(list(folder.glob("index/*.safetensors")))
    data = DataConfig(
        near_dedup_threshold=_THRESHOLD if is_near else None, selection_task_bytes=task_mib << 20
    )
    with local_ray(num_cpus=num_workers, object_store_memory=256 << 20):
        process, started = psutil.Process(), time.monotonic()
        before = process.io_counters().write_bytes
        with ProcessMeter(process.pid) as meter:
            summary = select(open_storage(str(folder)), indexed, data)
        return {
            "seconds": round(time.monotonic() - started, 2),
            "cpu_s": round(meter.cpu_s(), 2),
            "worker_mb": round(max(meter.peaks_mb("worker"), default=0.0), 1),
            "driver_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
            "driver_disk_mb": round((process.io_counters().write_bytes - before) / 1e6, 2),
            "store_mb": round(
                sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1
            ),
            "dropped": {reason: count for reason, count in summary.dropped.items() if count},
        }


def measured(
    num_documents: int, *, num_workers: int, is_near: bool, is_crowded: bool, task_mib: int
) -> dict[str, Any]:
    say(f"{num_documents:,} documents{', with near-duplicates' if is_near else ''}")
    with tempfile.TemporaryDirectory(
        prefix="raymill-bench-", ignore_cleanup_errors=True
    ) as scratch:
        make_indexes(
            Path(scratch), num_documents=num_documents, is_near=is_near, is_crowded=is_crowded
        )
        command = [sys.executable, "-m", "tests.benchmarks.bench_selection", "--run", scratch]
        command += [
            "--workers",
            str(num_workers),
            "--task-mib",
            str(task_mib),
            *(["--near"] if is_near else []),
        ]
        job = subprocess.run(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        return {"documents": num_documents} | json.loads(job.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--near", action="store_true", help="find near-duplicates too")
    parser.add_argument(
        "--crowded", action="store_true", help="let families of copies grow with the corpus"
    )
    parser.add_argument("--task-mib", type=int, default=32, help="data.selection_task_bytes, MiB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = {
        "num_workers": arguments.workers,
        "is_near": arguments.near,
        "task_mib": arguments.task_mib,
    }
    if arguments.run:
        print(json.dumps(run_selection(arguments.run, **options)))
        return 0
    options["is_crowded"] = arguments.crowded
    results = [measured(num_documents, **options) for num_documents in arguments.documents]
    table = Table(
        "documents",
        "driver MB",
        "driver's disk MB",
        "worker MB",
        "store MB",
        "seconds",
        "CPU-seconds",
    )
    for found in results:
        names = (
            "documents",
            "driver_mb",
            "driver_disk_mb",
            "worker_mb",
            "store_mb",
            "seconds",
            "cpu_s",
        )
        table.add_row(*(f"{found[name]:,}" for name in names))
    Console().print(table)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
