"""Goodput on a trace of spot nodes: raymill beside stock Ray Train, torchft and a plain restart from
checkpoints, one after another on local clusters of real Ray nodes.

    make bench-goodput TRACE=FILE
    python -m tests.benchmarks.bench_goodput FILE [--factor 60] [--hours 10.5 13.5] [--ways kills]

A trace has lines `seconds,nodes` of 0 to 4 nodes. Its time runs `--factor` times as fast, and so do
its notices of two minutes; what a contender does takes the time that it takes. A step waits for each
row, so that one machine can stand for four. Prints a table and, last, one JSON object; writes a
picture for each way beside it.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from jobs.plan.spot_trace import SpotTrace, read_trace
from raymill.errors import UserError
from tests.benchmarks.goodput.accounting import Account, Kind, account
from tests.benchmarks.goodput.contenders.contract import BATCH, SEQ_LEN, Contender, Settings
from tests.benchmarks.goodput.contenders.ray_train import RayTrain
from tests.benchmarks.goodput.contenders.raymill import Raymill
from tests.benchmarks.goodput.contenders.restart import Restart
from tests.benchmarks.goodput.contenders.torchft import Torchft
from tests.benchmarks.goodput.one_run import WAYS, Way, require_replayable, run
from tests.benchmarks.goodput.picture import picture
from tests.benchmarks.goodput.records import Record

CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind for kind in (Raymill, RayTrain, Torchft, Restart)
}
LOOK_S = 10.0
"""Seconds between looks for new nodes, of raymill and Ray Train alike: raymill's default. With two, a
group on a busy machine was resized again before it took a step."""

PRICE = 1.0
"""Dollars for an hour of a node, if `--price` says nothing: costs are proportional to it."""


def cut(trace: SpotTrace, hours: Sequence[float] | None) -> SpotTrace:
    """Returns the part of a trace between two hours of it."""
    if hours is None:
        return trace
    start_s, end_s = (3600 * hour for hour in hours)
    if not 0 <= start_s < end_s <= trace.duration:
        raise UserError(
            f"--hours {hours[0]:g} {hours[1]:g}: expected two of 0 to {trace.duration / 3600:g}, in order"
        )
    inside = [
        (max(start, start_s) - start_s, nodes)
        for start, end, nodes in trace.intervals()
        if end > start_s and start < end_s
    ]
    return SpotTrace(tuple(inside), end_s - start_s)


def figures(accounted: Account) -> dict[str, Any]:
    """Returns an account's figures for JSON."""
    return {
        "goodput": round(accounted.goodput, 4),
        "tokens": accounted.rows * SEQ_LEN,
        "node_seconds": {kind: round(s, 1) for kind, s in accounted.node_seconds.items()},
        "without_nodes_s": round(accounted.without_nodes_s, 1),
        "steps": accounted.num_steps,
        "steps_again": accounted.num_again,
        "samples_repeated": accounted.repeated,
        "samples_never": accounted.never,
        "last_weights": list(accounted.weights.items())[-1:],
    }


def same_weights(accounts: Sequence[Account]) -> dict[str, Any]:
    """Returns up to which step all of a contender's runs have hashes, and whether they are equal at
    each of those steps; None of a single run."""
    common = set.intersection(*(set(accounted.weights) for accounted in accounts))
    differ = [step for step in common if len({a.weights[step] for a in accounts}) > 1]
    are_equal = bool(common) and not differ if len(accounts) > 1 else None
    return {"up_to_step": max(common, default=0), "equal": are_equal}


def measure(
    trace: SpotTrace,
    kinds: Sequence[type[Contender]],
    ways: Sequence[Way],
    folder: Path,
    *,
    factor: float,
    row_s: float,
    save_every_steps: int,
    seed: int,
) -> dict[tuple[str, str], Record]:
    """Returns the record of each way and contender, which take turns. One that fails is told of and
    left out."""
    records: dict[tuple[str, str], Record] = {}
    for way in ways:
        settings = Settings(row_s, save_every_steps, has_notices=bool(way.notice_s), look_s=LOOK_S)
        for kind in kinds:
            place = folder / way.name / kind.name
            try:
                records[way.name, kind.name] = run(
                    kind, trace, way, settings, place, factor=factor, seed=seed
                )
            except RuntimeError as error:
                say(f"{kind.name}, {way.name}: {error}; its files are in {place}")
    return records


def table(accounts: Mapping[tuple[str, str], Account], *, price: float) -> str:
    kinds = [kind for kind in Kind if kind is not Kind.USEFUL]
    lines = [f"{'way':8} {'contender':10} goodput  " + "".join(f"{kind:>12}" for kind in kinds)]
    lines[0] += f"{'again':>7}{'twice':>7}{'never':>7}{'$/Mtok':>8}"
    for (way, name), accounted in accounts.items():
        seconds = "".join(f"{accounted.node_seconds[kind]:12.1f}" for kind in kinds)
        dollars = "-"
        if accounted.rows:
            cost = accounted.dollars_per_million_tokens(
                row_tokens=SEQ_LEN, price_per_node_hour=price
            )
            dollars = f"{cost:.3f}"
        line = f"{way:8} {name:10} {accounted.goodput:7.3f}  {seconds}{accounted.num_again:7}"
        lines.append(f"{line}{accounted.repeated:7}{accounted.never:7}{dollars:>8}")
    return "\n".join(lines)


def installed(names: Sequence[str]) -> list[type[Contender]]:
    """Returns the contenders that can run, and says which cannot."""
    kinds = []
    for name in names:
        kind = CONTENDERS[name]
        if problem := kind.missing():
            say(f"{name} is left out: {problem}")
        else:
            kinds.append(kind)
    return kinds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", help="a file of lines seconds,nodes")
    parser.add_argument("--factor", type=float, default=60.0, help="how much faster time runs")
    parser.add_argument("--hours", type=float, nargs=2, help="a part of the trace")
    parser.add_argument("--row-s", type=float, default=0.2, help="a row's seconds on a node")
    parser.add_argument("--save-every-steps", type=int, default=10)
    parser.add_argument("--price", type=float, default=PRICE, help="dollars for a node's hour")
    parser.add_argument("--seed", type=int, default=0, help="draws which nodes go")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--folder", type=Path, help="keeps logs, records and pictures")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    trace = cut(read_trace(asked.trace), asked.hours)
    require_replayable(trace)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="raymill-goodput-"))
    say(f"time runs {asked.factor:g} times as fast; logs and pictures are in {folder}")
    load_before = os.getloadavg()
    records = measure(
        trace,
        installed(asked.contenders),
        [WAYS[name] for name in asked.ways],
        folder,
        factor=asked.factor,
        row_s=asked.row_s,
        save_every_steps=asked.save_every_steps,
        seed=asked.seed,
    )
    accounts = {key: account(record, row_s=asked.row_s) for key, record in records.items()}
    for way in asked.ways:
        shown = {name: record for (of, name), record in records.items() if of == way}
        if shown:
            title = f"{Path(asked.trace).stem}, {way}, {asked.factor:g} times as fast"
            drawn = picture(
                shown, title=title, factor=asked.factor, row_s=asked.row_s, row_tokens=SEQ_LEN
            )
            (folder / f"{way}.png").write_bytes(drawn)
    print(table(accounts, price=asked.price))
    names = dict.fromkeys(name for _, name in accounts)
    result = {
        "trace": Path(asked.trace).name,
        "hours": asked.hours,
        "factor": asked.factor,
        "row_s": asked.row_s,
        "batch": BATCH,
        "price_per_node_hour": asked.price,
        "load_before_and_after": [load_before, os.getloadavg()],
        "runs": {f"{way} {name}": figures(a) for (way, name), a in accounts.items()},
        "weights": {
            name: same_weights([a for (_, other), a in accounts.items() if other == name])
            for name in names
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
