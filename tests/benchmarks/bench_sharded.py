"""Sharded training in numbers: raymill's ways to shard beside PyTorch's FSDP2 and
DistributedDataParallel, over gloo.

    python -m tests.benchmarks.bench_sharded [--without-large]

First which parts of FSDP2 run over gloo on CPUs. Then, by contender: the speed, where two workers
of one thread each take the same steps, and the contenders take turns; what a worker holds, measured
and counted; what it sends, counted by the kernel; the SHA-256 of the weights after two steps with
two and with four workers, which must be one for all of raymill's. Last, what each of four workers
holds of a model of 124M parameters. Prints tables and, last, one JSON object.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.settings.run import RunConfig
from jobs.training.mixed_hardware import hardware
from tests.benchmarks.exact_workers import CPU, LANES_PER_RANK, MICRO_BATCH_SIZE, VOCAB_SIZE
from tests.benchmarks.gloo_parts import tried
from tests.benchmarks.sharded_contenders import CONTENDERS, RAYMILL
from tests.benchmarks.sharded_workers import Party, Settings, forking_server

WORLD_SIZE, LARGER_WORLD = 2, 4
FIRST_STEPS = 2
NUM_ROUNDS = 6  # of a step each
COMPARED_WITH_4 = (*RAYMILL, "DDP", "FSDP2")
KEPT = ("weights", "gradients", "moments")
SEQ_LEN = 256
MODEL: Settings = {"preset": "small-10m", "vocab_size": VOCAB_SIZE}
LARGE_MODEL: Settings = {"preset": "gpt2-124m"}
LARGE_CONTENDER = "raymill parameters"
MOST_OF_A_QUARTER = 1.15

Figures = dict[str, Any]


def train_settings(*, num_lanes: int, micro_batch_size: int) -> Settings:
    batch = num_lanes * micro_batch_size
    sizes: Settings = {
        "global_batch_size": batch,
        "micro_batch_size": micro_batch_size,
        "seq_len": SEQ_LEN,
    }
    return sizes | {"max_tokens": 1000 * batch * SEQ_LEN}


TRAIN = train_settings(num_lanes=WORLD_SIZE * LANES_PER_RANK, micro_batch_size=MICRO_BATCH_SIZE)
LARGE_TRAIN = train_settings(num_lanes=2 * LARGER_WORLD, micro_batch_size=1)
STEP_TOKENS = WORLD_SIZE * LANES_PER_RANK * MICRO_BATCH_SIZE * SEQ_LEN


def parts_over_gloo(folder: Path) -> dict[str, str]:
    with forking_server().Pool(WORLD_SIZE) as pool:
        tasks = [(rank, WORLD_SIZE, str(folder / "parts")) for rank in range(WORLD_SIZE)]
        found: dict[str, str] = pool.starmap_async(tried, tasks, chunksize=1).get(timeout=240)[0]
    return found


def begun(party: Party) -> Figures:
    """Takes the first steps; returns what a worker then holds, and the hash of the weights."""
    print(f"{party.contender}: the first steps", file=sys.stderr)
    party.ask("steps", 1, FIRST_STEPS)
    return {"memory": most(party.ask("memory")), "hash": party.ask("hash", FIRST_STEPS)[0]}


def measured(folder: Path) -> dict[str, Figures]:
    """Returns the figures of each contender."""
    found: dict[str, Figures] = {name: {} for name in CONTENDERS}
    for name in COMPARED_WITH_4:
        with Party(name, LARGER_WORLD, folder, MODEL, TRAIN) as party:
            found[name]["of_4"] = begun(party)
    with contextlib.ExitStack() as parties:
        running = [
            parties.enter_context(Party(name, WORLD_SIZE, folder, MODEL, TRAIN))
            for name in CONTENDERS
        ]
        for party in running:
            found[party.contender] |= {"of_2": begun(party), "rounds": []}
        for number in range(NUM_ROUNDS):
            print(f"round {number + 1} of {NUM_ROUNDS}", file=sys.stderr)
            turn = number % len(running)
            for party in running[turn:] + running[:turn]:
                found[party.contender]["rounds"].append(
                    most(party.ask("steps", FIRST_STEPS + 1 + number, 1))
                )
    return found


def most(answers: list[dict[str, float]]) -> dict[str, float]:
    """Returns the largest figure of any worker."""
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def large_memory(folder: Path) -> Figures:
    """Returns what a worker holds of a large model, alone and as one of four that share the
    parameters."""
    with Party("raymill none", 1, folder, LARGE_MODEL, LARGE_TRAIN) as party:
        (whole,) = party.ask("memory")
    with Party(LARGE_CONTENDER, LARGER_WORLD, folder, LARGE_MODEL, LARGE_TRAIN) as party:
        party.ask("steps", 1, 1)
        found: Figures = most(party.ask("memory"))
        found |= party.ask("transients", 2)[0]
    found["whole"] = sum(whole[name] for name in KEPT)
    return found | {
        "over_quarter": sum(found[name] for name in KEPT) / (found["whole"] / LARGER_WORLD)
    }


def speeds(found: dict[str, Figures]) -> None:
    """Adds the speed of each contender, and how many times as fast as another one it is: medians
    over the rounds."""
    for name, figures in found.items():
        seconds = column(figures, "seconds")
        figures["tokens_per_s"] = STEP_TOKENS / statistics.median(seconds)
        figures["spread"] = (max(seconds) - min(seconds)) / statistics.median(seconds)
        figures["cpu_s"], figures["sent"] = (
            statistics.median(column(figures, field)) for field in ("cpu", "bytes")
        )
        figures["over_unsharded"] = ratio(
            found["raymill none" if name in RAYMILL else "DDP"], figures
        )
        figures["over_fsdp2"] = ratio(found["FSDP2"], figures)


def column(figures: Figures, field: str) -> list[float]:
    return [taken[field] for taken in figures["rounds"]]


def ratio(theirs: Figures, ours: Figures) -> float:
    pairs = zip(column(theirs, "seconds"), column(ours, "seconds"), strict=True)
    return statistics.median(their / our for their, our in pairs)


def print_tables(found: dict[str, Figures]) -> None:
    print(
        f"\n{'speed with 2 workers':24} {'tokens/s':>8} {'spread':>7} {'/unsharded':>11} {'/FSDP2':>7} {'CPU s':>6} {'MB sent':>8}"
    )
    for name, of in found.items():
        print(
            f"{name:24} {of['tokens_per_s']:8,.0f} {of['spread']:7.0%} {of['over_unsharded']:11.2f} {of['over_fsdp2']:7.2f}"
            f" {of['cpu_s']:6.2f} {of['sent'] / 1e6:8.1f}"
        )
    print(
        f"\n{'MB of a worker, of 2':24} {'peak':>8} {'weights':>8} {'gradients':>9} {'moments':>8} {'other kept':>10}"
    )
    for name, of in found.items():
        held = {field: value / 1e6 for field, value in of["of_2"]["memory"].items()}
        print(
            f"{name:24} {held['peak']:8.1f} {held['weights']:8.1f} {held['gradients']:9.1f} {held['moments']:8.1f}"
            f" {held['other']:10.1f}"
        )
    print(f"\n{'SHA-256 of the weights':24} {'2 workers':20} 4 workers")
    for name in COMPARED_WITH_4:
        of = found[name]
        print(f"{name:24} {of['of_2']['hash'][:16]:20} {of['of_4']['hash'][:16]}")


def print_large(large: Figures) -> None:
    print(
        f"\ngpt2-124m: {large['whole'] / 1e6:,.0f} MB of weights, gradients and moments without sharding"
    )
    held = ", ".join(f"{field} {large[field] / 1e6:.1f}" for field in (*KEPT, "other", "peak"))
    print(
        f"{LARGE_CONTENDER}, one of 4 workers: {large['over_quarter']:.3f} of a quarter of it; MB: {held}"
    )
    for field, text in (("kept", "kept beside them"), ("made", "made in a step")):
        for line in large[field]:
            print(f"    {text}: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--without-large", action="store_true", help="without the model of 124M parameters"
    )
    arguments = parser.parse_args()
    print(", ".join(f"{name}: {value}" for name, value in hardware(RunConfig(), CPU).items()))
    with tempfile.TemporaryDirectory(prefix="raymill-bench-sharded-") as scratch:
        parts = parts_over_gloo(Path(scratch))
        print("\nparts of FSDP2 over gloo, 2 processes")
        for name, text in parts.items():
            print(f"    {name:44} {text}")
        found = measured(Path(scratch))
        speeds(found)
        print_tables(found)
        large = {} if arguments.without_large else large_memory(Path(scratch))
    if large:
        print_large(large)
    print(json.dumps({"parts": parts, "contenders": found, "large": large}))
    ours = {found[name][world]["hash"] for name in RAYMILL for world in ("of_2", "of_4")}
    assert len(ours) == 1, (
        "raymill's weights depend on how they were sharded, or on the number of workers"
    )
    if large:
        assert large["over_quarter"] <= MOST_OF_A_QUARTER
    return 0


if __name__ == "__main__":
    sys.exit(main())
