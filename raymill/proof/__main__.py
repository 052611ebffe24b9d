"""Shows that the weights do not depend on the number of workers: trains a small network over and over,
and prints a table of the SHA-256 of its final weights.

    python -m raymill.proof [--steps 20] [--seed 0] [--rows ROW...] [--without-peers]
    python -m raymill.proof --another-seed-in "2 workers"
    python -m raymill.proof --device cuda --most-workers 8 --json FILE

A row is a number of workers, one that changes, or one of which a worker is killed; a column is a
way to train. Each worker is a process of one thread, and they talk over gloo on this machine; with
GPUs, over NCCL where each has its own, else through the host (`place`). PyTorch's own ways do the
same work in the same setting (`peers`). The exit code is 1 if two hashes of raymill's differ, or
if it does not run.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from raymill.proof.processes import FailedTrainingError, prepare, trained
from raymill.proof.rows import (
    LEAST_STEPS,
    LEAST_WORKERS,
    NUM_LANES,
    OURS,
    PEERS,
    Row,
    rows_of,
)

if TYPE_CHECKING:
    from raymill.proof.worker import Ending

_ROW_WIDTH, _COLUMN_WIDTH = 19, 12
_NUM_DIGITS = 10  # of a hash


class Table:
    """The endings by way to train, printed cell by cell as they come."""

    def __init__(self, ways: list[str], folder: Path, *, kind: str) -> None:
        self.endings: dict[str, list[Ending]] = defaultdict(list)
        self.failures: dict[str, str] = {}
        self.cells: dict[str, dict[str, str]] = {}  # by row and way
        self._ways = ways
        self._folder = folder
        self._kind = kind

    def print_head(self) -> None:
        owners = f"{'':{_ROW_WIDTH}}{'raymill, dividing':{_COLUMN_WIDTH * len(OURS)}}"
        owners += "PyTorch's own" if PEERS[0] in self._ways else ""
        print(owners.rstrip())
        ways = "".join(f"{way:{_COLUMN_WIDTH}}" for way in self._ways)
        print(f"{'':{_ROW_WIDTH}}{ways}".rstrip())

    def fill(self, row: Row, *, seed: int, seed_of_ours: int) -> None:
        gap = " " * (_ROW_WIDTH - len(row.name))
        print(row.name, end="", flush=True)
        self.cells[row.name] = {}
        for way in self._ways:
            cell = self._cell(way, row, seed_of_ours if way in OURS else seed)
            self.cells[row.name][way] = cell
            print(gap + cell, end="", flush=True)
            gap = " " * (_COLUMN_WIDTH - len(cell))
        print()

    def _cell(self, way: str, row: Row, seed: int) -> str:
        if way in self.failures:
            return "-"
        if way in PEERS and not row.is_even:
            return "uneven"
        try:
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                ending = trained(way, row, folder=Path(folder), seed=seed, kind=self._kind)
        except FailedTrainingError as error:
            self.failures[way] = str(error)
            return "does not run"
        self.endings[way].append(ending)
        return ending.weights_hash[:_NUM_DIGITS]


def verdict(table: Table) -> tuple[bool, str]:
    """Returns whether raymill trained in each way and all of its hashes are one, and a sentence
    about all."""
    ours = [ending for way in OURS for ending in table.endings[way]]
    parts = [f"raymill's {len(ours)} trainings end with {_hashes(ours)}"]
    for way in PEERS:
        if endings := table.endings[way]:
            parts.append(f"{way}'s {len(endings)} with {_hashes(endings)}")
    is_one = len({ending.weights_hash for ending in ours}) == 1
    has_failed = not table.failures.keys().isdisjoint(OURS)
    return is_one and not has_failed, f"{', '.join(parts)}."


def _hashes(endings: "list[Ending]") -> str:
    number = len({ending.weights_hash for ending in endings})
    return f"{number} hash" if number == 1 else f"{number} hashes"


def losses(table: Table) -> str:
    found = [ending.loss for endings in table.endings.values() for ending in endings]
    if not found:
        return "Nothing was trained."
    return (
        f"The loss of the last step lies between {min(found):.6f} and {max(found):.6f} "
        f"in all {len(found)} trainings."
    )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m raymill.proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [row.name for row in rows_of(LEAST_STEPS, most_workers=NUM_LANES)]
    parser.add_argument("--steps", type=int, default=20, help=f"{LEAST_STEPS} or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", metavar="ROW", nargs="+", choices=names, default=names, help=_listed(names)
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--most-workers",
        type=int,
        default=LEAST_WORKERS,
        help=f"of a row: {LEAST_WORKERS} to {NUM_LANES}",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the table is written, too")
    parser.add_argument("--without-peers", action="store_true", help="raymill's trainings alone")
    parser.add_argument(
        "--another-seed-in",
        metavar="ROW",
        choices=names,
        help="a row in which raymill has another seed, to show that the hashes can differ",
    )
    given = parser.parse_args(words)
    if given.steps < LEAST_STEPS:
        parser.error(f"--steps {given.steps}: expected {LEAST_STEPS} or more")
    if not LEAST_WORKERS <= given.most_workers <= NUM_LANES:
        parser.error(
            f"--most-workers {given.most_workers}: expected {LEAST_WORKERS} to {NUM_LANES}"
        )
    return given


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def main(words: list[str] | None = None) -> int:
    given, start_s = arguments(words), time.monotonic()
    print(
        f"{processor()}, PyTorch {metadata.version('torch')}. A small network, {given.steps} steps of {NUM_LANES} "
        "micro-batches (lanes),\nAdamW, dropout, one thread a worker. The SHA-256 of the final weights:\n",
        flush=True,
    )
    prepare()
    rows = rows_of(given.steps, most_workers=given.most_workers)
    with tempfile.TemporaryDirectory(prefix="raymill-proof-") as folder:
        ways = [*OURS, *(() if given.without_peers else PEERS)]
        table = Table(ways, Path(folder), kind=given.device)
        table.print_head()
        for row in [row for row in rows if row.name in given.rows]:
            is_spoiled = row.name == given.another_seed_in
            table.fill(row, seed=given.seed, seed_of_ours=given.seed + is_spoiled)
    for way, reason in table.failures.items():
        print(f"\n{way} does not run here: {reason}")
    is_one, sentence = verdict(table)
    print(f"\n{losses(table)} {time.monotonic() - start_s:.0f} s.")
    print(sentence)
    if given.json:
        told = {"rows": table.cells, "reasons": table.failures, "verdict": sentence}
        given.json.write_text(json.dumps(told))
    return 0 if is_one else 1


if __name__ == "__main__":
    sys.exit(main())
