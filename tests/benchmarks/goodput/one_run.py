"""Runs one contender on one replay of a trace, on a cluster of its own, and returns its record."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.local.local_cluster import LocalCluster
from cluster.output.progress import say
from jobs.plan.spot_trace import SpotTrace
from raymill.errors import UserError
from tests.benchmarks.goodput.contenders.contract import MAX_NODES, Contender, Settings
from tests.benchmarks.goodput.drain import Drainer
from tests.benchmarks.goodput.records import Record
from tests.benchmarks.goodput.replay import Replay, lifetimes
from tests.paced_steps import paced

_START_S = 300.0  # within which a contender trains on all first nodes
_FIRST_STEPS = 3
_POLL_S = 0.2


@dataclass(frozen=True)
class Way:
    """How nodes go."""

    name: str
    notice_s: float | None  # in the trace's time; None kills without notice


WAYS = {"notices": Way("notices", 120.0), "kills": Way("kills", None)}


def run(
    kind: type[Contender],
    trace: SpotTrace,
    way: Way,
    settings: Settings,
    folder: Path,
    *,
    factor: float,
    seed: int,
) -> Record:
    """Replays the trace with time that runs `factor` times as fast. The clock begins once the
    contender trains on the trace's first nodes. Raises `RuntimeError` where it never does, or ends
    before the trace."""
    folder.mkdir(parents=True)
    contender = kind(settings, folder)
    replayed = trace.compressed(factor)
    nodes = lifetimes(replayed, seed=seed)
    first = replayed.changes[0][1]
    with (
        paced(folder, place="pass") as pace,
        pace.slow(settings.row_s),
        LocalCluster(num_nodes=1 + first, cpus_per_node=1) as cluster,
        Drainer(cluster, log=folder / "drain.log") as drainer,
        contender.training(cluster),
    ):
        notice_s = way.notice_s / factor if way.notice_s else None
        replay = Replay(cluster, drainer, contender, notice_s)
        initial = replay.see_first_nodes()
        _wait_until_trained(contender, first)
        say(f"{contender.name}, {way.name}: {replayed.duration:.0f} s with {len(nodes)} nodes")
        end_s = replay.run(nodes, initial=initial, duration_s=replayed.duration)
        steps, marks = contender.read()
        record = Record(tuple(steps), tuple(marks), tuple(replay.counts), end_s)
        (folder / "record.json").write_text(json.dumps(asdict(record)))
        return record


def require_replayable(trace: SpotTrace) -> None:
    """Raises `UserError` for a trace that these contenders cannot be shown on."""
    if trace.max_nodes > MAX_NODES:
        raise UserError(
            f"the trace has up to {trace.max_nodes} nodes, expected at most {MAX_NODES}"
        )
    if trace.changes[0][1] < 1:
        raise UserError("the trace begins without a node, so no contender could start; cut it")


def _wait_until_trained(contender: Contender, world_size: int) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        contender.tick()
        steps, _ = contender.read()
        if sum(step.world_size == world_size for step in steps) >= _FIRST_STEPS:
            return
        if time.monotonic() > deadline_s:
            raise RuntimeError(
                f"{contender.name} did not train on {world_size} nodes within {_START_S:.0f} s"
            )
        time.sleep(_POLL_S)
