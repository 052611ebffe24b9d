"""Exchanges made-up sums over real gloo processes, for worlds of several sizes in turn.

    python -m tests.jobs.exchange_worlds FOLDER WORLD_SIZE...

Prints one JSON object for each world, number of lanes and choice of nodes: whether every rank ended
with the bits of the tree, and how many bytes rank 0 sent, beside those of a ring.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.settings.run import ScalingConfig
from jobs.exact.run_values import run_sharding
from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.peers import Peers
from raymill.state.shard import Shard
from raymill.state.sharding import Sharding
from raymill.sums.bucket_exchange import BucketExchange
from raymill.sums.exact_reduce import tree_sum
from raymill.sums.step_plan import StepPlan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.sent_bytes import sent_bytes

LAYOUT = FlatLayout.of({f"h.{number}.weight": (3 * BLOCK, 2) for number in range(4)})
NODES = ("aaaaaaaaa", "aaabbbccc", "abcabcabc")  # of the ranks


def sum_of(node: range) -> Tensor:
    """Returns the sum of some lanes, each of which is a function of its number."""

    def lane(node: range) -> Tensor | None:
        if len(node) > 1:
            return None
        generator = torch.Generator().manual_seed(node.start)
        return torch.randn(LAYOUT.size, generator=generator)

    return tree_sum(node, lane)


def exchanged(sharding: Sharding, group: WorkerGroup, num_lanes: int) -> dict[str, Any]:
    plan = StepPlan(sharding, num_lanes, 1)
    subtrees = plan.subtrees[group.rank]
    buffers = [sum_of(node) for node in subtrees]
    peers = Peers(sharding.counterparts, group)
    parts_of_peers = LAYOUT.parts_of_owners(sharding.owners) if sharding.owners else None
    exchange = BucketExchange(LAYOUT.buckets, buffers, peers, parts=parts_of_peers)
    exchange.begin(plan.teams, subtrees=subtrees)
    with sent_bytes() as sent:
        for number in range(len(LAYOUT.buckets)):
            exchange.exchange(number)
        exchange.wait()
    exchange.close()
    parts = LAYOUT.whole.spans
    if not sharding.sends_sums:
        parts = LAYOUT.parts(group.rank, world_size=group.world_size).spans
    expected = sum_of(range(num_lanes))
    is_right = all(torch.equal(part.of(buffers[0]), part.of(expected)) for part in parts)
    return {"is_right": is_right, "num_bytes": sent.num_bytes}


def run_rank(rank: int, folder: Path, world_sizes: list[int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    outcomes: list[dict[str, Any]] = []
    for size in world_sizes:
        if rank >= size:
            continue
        store = f"file://{folder}/world-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        group = WorkerGroup(rank, size)
        shards: tuple[Shard, ...] = ("none", "optimizer")
        for shard in shards:
            for nodes in NODES:
                scaling = ScalingConfig(shard=shard, max_workers=1)
                sharding = run_sharding(
                    scaling, rank=rank, world_size=size, nodes=list(nodes[:size])
                )
                for num_lanes in (size, 16, 41):
                    outcome = exchanged(sharding, group, num_lanes)
                    ranks = group.gather(outcome["is_right"])
                    case = {"world": size, "shard": shard, "nodes": nodes, "lanes": num_lanes}
                    outcomes.append(case | outcome | {"is_right": all(ranks)})
        dist.barrier()
        dist.destroy_process_group()
    return outcomes


if __name__ == "__main__":
    folder, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(max(sizes)) as pool:
        results = pool.starmap(
            run_rank, [(rank, folder, sizes) for rank in range(max(sizes))], chunksize=1
        )
    print(json.dumps(results[0]))
