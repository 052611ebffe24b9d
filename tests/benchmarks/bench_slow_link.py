"""The exchange of a step between nodes that are joined by a slow network: with a message to each
other worker, by halving, and by halving while the bundle before is gathered, as in training.

    python -m tests.benchmarks.bench_slow_link [--mbit 100] [--values 3000000]

Nodes are network namespaces of this machine, joined by a bridge. `tc` lets through so many megabits
a second from and to each node; workers of one node talk without a bound. It needs root, `ip` and
`tc`, and prints a row for each number of nodes and workers.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from raymill.side_thread import SideThread
from raymill.state.bundle import bundles_of
from raymill.state.division import Division
from raymill.state.doubling import gather, teams_to_gather
from raymill.state.flat_layout import FlatLayout
from raymill.state.peers import Peers
from raymill.sums.bucket_exchange import GATHER_TAG
from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.halving import HalvedSums, Room
from raymill.sums.teams import TeamPlan, plan_without_pairings, team_plan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.sent_bytes import sent_bytes
from tests.repository import REPOSITORY

SHAPES = [(2, 1), (4, 1), (2, 2), (8, 1), (4, 2), (2, 4), (7, 1)]  # nodes, and workers of each
LANES = 16
NUM_STEPS = 5  # of which the first one connects
BRIDGE = "rmbench"
# A namespace lasts a little longer than its name, and its end of a link with it.
_NUMBERS = itertools.count()


@contextmanager
def nodes(num_nodes: int, mbit: float) -> Iterator[list[str]]:
    """Lasts while so many namespaces are joined by a bridge; yields their names."""
    bridge = f"{BRIDGE}{next(_NUMBERS)}"
    names = [f"{bridge}n{number}" for number in range(num_nodes)]
    shaped = f"root tbf rate {mbit}mbit burst 64kb latency 200ms"
    _run(f"ip link add {bridge} type bridge")
    try:
        _run(f"ip link set {bridge} up")
        for number, name in enumerate(names):
            _run(f"ip netns add {name}")
            _run(f"ip link add {name}v type veth peer name net0 netns {name}")
            _run(f"ip link set {name}v master {bridge} up")
            inside = f"ip netns exec {name}"
            _run(f"{inside} ip addr add 10.83.0.{number + 1}/24 dev net0")
            _run(f"{inside} ip link set net0 up")
            _run(f"{inside} ip link set lo up")
            _run(f"{inside} tc qdisc add dev net0 {shaped}")
            _run(f"tc qdisc add dev {name}v {shaped}")
        yield names
    finally:
        for name in names:
            for command in (f"ip link del {name}v", f"ip netns del {name}"):
                subprocess.run(command.split(), check=False, capture_output=True)
        _run(f"ip link del {bridge}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def exchanged(
    peers: Peers,
    plan: TeamPlan,
    complete: Callable[[Peers, Tensor, Division], None],
    flats: list[Tensor],
    layout: FlatLayout,
    beside: SideThread | None,
) -> None:
    room = Room(torch.device("cpu"))
    for bundle in bundles_of(layout.buckets, len(peers), parts=None):
        vectors = [bundle.packed(flat) for flat in flats]
        HalvedSums(peers, plan, room).finish(vectors, bundle.division)
        if beside:
            beside.submit(complete, peers, vectors[0], bundle.division)
        else:
            complete(peers, vectors[0], bundle.division)
    if beside:
        beside.wait()


def run_worker(rank: int, world_size: int, num_values: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    peers = Peers([*range(world_size)], WorkerGroup(rank, world_size))
    layout = FlatLayout.of({f"h.{n}.weight": (num_values // 16, 1, 1) for n in range(16)})
    subtrees = subtrees_of_ranks(LANES, world_size)
    roots = [range(LANES)]
    singles = [range(peer, peer + 1) for peer in range(world_size)]
    halving = (team_plan(roots, subtrees), teams_to_gather(world_size))
    ways = {
        "message to each": (plan_without_pairings(roots, subtrees), singles, None),
        "halving": (*halving, None),
        "halving and gathering": (*halving, SideThread()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, dict[str, float]] = {}
    results: dict[str, Tensor] = {}
    for _ in range(NUM_STEPS):  # in turns
        for name, (plan, teams, beside) in ways.items():
            generator = torch.Generator().manual_seed(rank)
            flats = [torch.randn(layout.size, generator=generator) for _ in subtrees[rank]]
            dist.barrier()
            start_s = time.perf_counter()
            with sent_bytes() as sent:
                exchanged(
                    peers,
                    plan,
                    partial(gather, teams=teams, tag=GATHER_TAG),
                    flats,
                    layout,
                    beside,
                )
            dist.barrier()
            seconds[name].append(time.perf_counter() - start_s)
            results[name] = flats[0]
            found[name] = {"bytes": sent.num_bytes}
    for name, result in results.items():
        assert torch.equal(result, results["halving"]), "all ways have the same bits"
        found[name]["seconds"] = statistics.median(seconds[name][1:])
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def measured(num_nodes: int, workers: int, num_values: int, mbit: float) -> dict[str, object]:
    """Returns the median seconds of an exchange, by its way."""
    with tempfile.TemporaryDirectory() as folder, nodes(num_nodes, mbit) as names:
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "net0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        processes = []
        for rank in range(num_nodes * workers):
            command = ["ip", "netns", "exec", names[rank // workers], sys.executable, "-m"]
            command += ["tests.benchmarks.bench_slow_link", "--rank", str(rank)]
            command += ["--world", str(num_nodes * workers), "--values", str(num_values)]
            command += ["--store", str(Path(folder) / "store")]
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment, stdout=output, text=True))
        printed, _ = processes[0].communicate()
        assert all(process.wait() == 0 for process in processes)
        found: dict[str, object] = json.loads(printed.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, default=100.0, help="of each node's link")
    parser.add_argument("--values", type=int, default=3_000_000, help="of the gradient, in fp32")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world", type=int)
    parser.add_argument("--store")
    options = parser.parse_args()
    if options.rank is not None:
        run_worker(options.rank, options.world, options.values, options.store)
        return
    for num_nodes, workers in SHAPES:
        found = measured(num_nodes, workers, options.values, options.mbit)
        print(json.dumps({"nodes": num_nodes, "workers of each": workers} | found), flush=True)


if __name__ == "__main__":
    main()
