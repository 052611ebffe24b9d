"""Processor time for each token beside the engine's: of front door and replica, in one process without
Ray.

    python -m tests.benchmarks.bench_cpu_per_token [--rounds 5] [--beside CHECKOUT]

A small model's steps are so short that several of them are reported at once: one stream, eight
streams, eight whole answers, and 200 answers of one token, eight at a time. A larger model's steps
take longer than a report waits for the next one, as in real models, so that each wakes everything
on its way: one stream, and eight.

Prints the medians over the rounds, in microseconds a token, of the endpoint and of its engine's
process; with `--beside`, those of another checkout of raymill too, and the median of the rounds'
ratios, with the smallest and the largest. The two take turns, and one stands still: what else the
machine does disturbs both alike. Last, it prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil

from model.config import GPTConfig
from tests.benchmarks.bench_serve import write_model
from tests.benchmarks.http_load import MODEL, TIMEOUT_S, BenchError
from tests.benchmarks.serve_contenders import HttpContender
from tests.repository import REPOSITORY

SMALL, LARGE = "small", "large"
SHAPES = {
    SMALL: GPTConfig(vocab_size=4000, n_positions=1024, n_layer=2, n_head=2, n_embd=64),
    LARGE: GPTConfig(vocab_size=4000, n_positions=256, n_layer=12, n_head=12, n_embd=768),
}
SERVER = REPOSITORY / "tests" / "benchmarks" / "local_endpoint.py"
ENGINE = "serving.engine_process.run_engine"
EVENT = b"data: {"
HERE, BESIDE = "here", "beside"


class Case(NamedTuple):
    model: str
    name: str
    is_stream: bool
    at_once: int
    num_requests: int
    new_tokens: int  # of each request

    @property
    def num_tokens(self) -> int:
        return self.num_requests * self.new_tokens


CASES = (
    Case(SMALL, "1 stream", True, 1, 1, 900),
    Case(SMALL, "8 streams", True, 8, 8, 400),
    Case(SMALL, "8 whole answers", False, 8, 8, 400),
    Case(SMALL, "200 answers of 1 token", False, 8, 200, 1),
    Case(LARGE, "1 stream", True, 1, 1, 64),
    Case(LARGE, "8 streams", True, 8, 8, 32),
)


class Cost(NamedTuple):
    """Processor time for each token, in microseconds."""

    endpoint_us: float
    engine_us: float


class LocalEndpoint(HttpContender):
    """An endpoint of a checkout's code."""

    def __init__(self, name: str, folder: Path, *, log: Path, checkout: Path) -> None:
        command = [sys.executable, str(SERVER), str(folder)]
        environment = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        super().__init__(name, command, environment=environment, log=log, checkout=checkout)

    def _wait_until_ready(self) -> None:
        super()._wait_until_ready()
        self.url = self.ready["url"]
        if not Path(self.ready["code"]).is_relative_to(self._checkout):
            raise BenchError(f"{self.name} runs {self.ready['code']}, not {self._checkout}")

    def spent_s(self) -> tuple[float, float]:
        """Returns the seconds so far of the endpoint, and of its engine."""
        is_engine = {process.pid: ENGINE in process.cmdline() for process in self._tree()}
        engine_s = sum(clock_s(pid) for pid in is_engine if is_engine[pid])
        return sum(map(clock_s, is_engine)) - engine_s, engine_s


def clock_s(pid: int) -> float:
    """Returns the processor time of a process, to the nanosecond; /proc gives hundredths of a second.
    The number of its clock is as in glibc's `clock_getcpuclockid`."""
    return time.clock_gettime(~pid << 3 | 2)


async def ask(session: aiohttp.ClientSession, url: str, case: Case) -> None:
    """Raises `BenchError` for another number of tokens than was asked for."""
    fields = {"model": MODEL, "prompt": "fox", "max_tokens": case.new_tokens, "ignore_eos": True}
    fields |= {"stream": case.is_stream}
    async with session.post(f"{url}/v1/completions", json=fields) as response:
        body = await response.read()
    if response.status != 200:
        raise BenchError(f"{url} answered {response.status}: {body[-500:]!r}")
    num_tokens = (
        body.count(EVENT) if case.is_stream else json.loads(body)["usage"]["completion_tokens"]
    )
    if num_tokens != case.new_tokens:
        raise BenchError(f"{url} gave {num_tokens} tokens where {case.new_tokens} were asked for")


async def asked(url: str, case: Case) -> None:
    """Asks for all answers of a case, so many at once."""
    waiting = iter(range(case.num_requests))
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)

    async def ask_in_turn(session: aiohttp.ClientSession) -> None:
        for _ in waiting:
            await ask(session, url, case)

    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.gather(*(ask_in_turn(session) for _ in range(case.at_once)))


def measure(contender: LocalEndpoint, case: Case) -> Cost:
    before_s = contender.spent_s()
    asyncio.run(asked(contender.url, case))
    after_s = contender.spent_s()
    spent_us = [1e6 * (end - start) for start, end in zip(before_s, after_s, strict=True)]
    return Cost(*(each_us / case.num_tokens for each_us in spent_us))


Costs = dict[tuple[Case, str], list[Cost]]  # by case and contender, one for each round


def take_turns(contenders: list[LocalEndpoint], cases: list[Case], *, num_rounds: int) -> Costs:
    costs: Costs = defaultdict(list)
    for number in range(num_rounds + 1):  # the first one warms up
        for contender in contenders if number % 2 else reversed(contenders):
            contender.resume()
            for case in cases:
                cost = measure(contender, case)
                costs[case, contender.name] += [cost] if number else []
            contender.pause()
    return costs


def compare(checkouts: dict[str, Path], *, num_rounds: int) -> Costs:
    """Returns the costs of all cases."""
    costs: Costs = {}
    for model, shape in SHAPES.items():
        with (
            tempfile.TemporaryDirectory(prefix="cpu-") as scratch,
            contextlib.ExitStack() as running,
        ):
            checkpoint = write_model(Path(scratch), shape)
            contenders = []
            for name, checkout in checkouts.items():
                log = Path(scratch) / f"{name}.log"
                contender = LocalEndpoint(name, checkpoint, log=log, checkout=checkout)
                contenders.append(running.enter_context(contender))
                contender.pause()
            cases = [case for case in CASES if case.model == model]
            costs |= take_turns(contenders, cases, num_rounds=num_rounds)
    return costs


def summary(costs: Costs, case: Case, names: Iterable[str]) -> dict[str, float]:
    """Returns the medians of a case, and how those here compare to those beside it."""
    cell: dict[str, float] = {}
    for name in names:
        for field in Cost._fields:
            values = [getattr(cost, field) for cost in costs[case, name]]
            cell[f"{name}_{field}"] = round(statistics.median(values), 1)
    if BESIDE in names:
        pairs = zip(costs[case, HERE], costs[case, BESIDE], strict=True)
        ratios = [here.endpoint_us / beside.endpoint_us for here, beside in pairs]
        cell["ratio"] = round(statistics.median(ratios), 3)
        cell["least"], cell["most"] = round(min(ratios), 3), round(max(ratios), 3)
    return cell


def row(case: Case, cell: dict[str, float], names: Iterable[str]) -> str:
    columns = [f"{case.model}, {case.name:22}"]
    for name in names:
        endpoint_us, engine_us = cell[f"{name}_endpoint_us"], cell[f"{name}_engine_us"]
        columns.append(f"{name}: endpoint {endpoint_us:6.1f} µs, engine {engine_us:7.1f} µs")
    if "ratio" in cell:
        columns.append(f"ratio {cell['ratio']:.2f} ({cell['least']:.2f} to {cell['most']:.2f})")
    return "  ".join(columns)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--beside", type=Path, help="another checkout of raymill")
    arguments = parser.parse_args()
    checkouts = {HERE: REPOSITORY}
    if arguments.beside is not None:
        checkouts[BESIDE] = arguments.beside.resolve()
    try:
        costs = compare(checkouts, num_rounds=arguments.rounds)
    except (BenchError, psutil.NoSuchProcess) as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 1
    cells = {f"{case.model}, {case.name}": summary(costs, case, checkouts) for case in CASES}
    for case, cell in zip(CASES, cells.values(), strict=True):
        print(row(case, cell, checkouts))
    print(json.dumps(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
