"""Seconds from the SIGKILL of a training worker to the next completed step, beside plain Ray Train
in the same run.

Both train the same model with two workers on the same local cluster, one after the other, and lose
a random worker again and again. A kill comes when the group has trained for a while, at least
`SETTLE_S`. Prints a line for each kill and, last, one JSON object.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from ray.job_submission import JobSubmissionClient

from cluster.local.local_cluster import LocalCluster
from cluster.output.progress import say
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from cluster.stages.stage import Connection, run_stage
from cluster.stages.stage_module import StageFailedError
from model.config import GPTConfig, preset_fields
from tests.jobs.corpora import number_texts
from tests.repository import REPOSITORY

NUM_WORKERS, BATCH, SEQ_LEN, VOCAB = 2, 32, 64, 300
SETTLE_S = 15.0
WAIT_S = 180.0


@dataclass(frozen=True)
class Step:
    """A completed step in the trainer's own record."""

    time: float
    step: int
    attempt: int  # counted, or told apart by the workers' processes


@dataclass(frozen=True)
class Record:
    steps: list[Step]
    pids: list[int]  # of the newest attempt's workers


@dataclass(frozen=True)
class Kill:
    recovery_s: float
    lost_steps: int


def raymill_record(ledger: Path) -> Record:
    lines = _lines(ledger)
    starts = [line for line in lines if line.get("event") == "start"]
    steps = [
        Step(line["time"], line["step"], line["attempt"]) for line in lines if "event" not in line
    ]
    return Record(steps, [worker["pid"] for worker in starts[-1]["workers"]] if starts else [])


def stock_record(log: Path) -> Record:
    """Returns the steps of rank 0's lines; rank 0's process names the attempt."""
    lines = _lines(log)
    steps = [Step(line["time"], line["step"], line["pid"]) for line in lines if line["rank"] == 0]
    newest = {line["rank"]: line["pid"] for line in lines}
    return Record(steps, list(newest.values()))


def _lines(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    )


def kill_workers(
    read: Callable[[], Record],
    *,
    num_kills: int,
    rng: random.Random,
    name: str,
    settle_s: float = SETTLE_S,
) -> list[Kill]:
    """Kills a random worker of the newest attempt, waits for the next attempt's first step, and so
    on."""
    kills: list[Kill] = []
    for number in range(1, num_kills + 1):
        kills.append(_kill_one(read, num_attempts=number, rng=rng, settle_s=settle_s))
        say(f"{name} kill {number}: {kills[-1].recovery_s} s, {kills[-1].lost_steps} steps lost")
    return kills


def _kill_one(
    read: Callable[[], Record], *, num_attempts: int, rng: random.Random, settle_s: float
) -> Kill:
    before = _wait(lambda: _settled(read(), num_attempts, seconds=settle_s))
    time.sleep(rng.random())
    killed_at = time.time()
    os.kill(rng.choice(before.pids), signal.SIGKILL)
    after = _wait(lambda: _settled(read(), num_attempts + 1, seconds=0.0))
    newest = after.steps[-1].attempt
    first = next(step for step in after.steps if step.attempt == newest)
    last = [step for step in after.steps if step.attempt != newest][-1]
    return Kill(round(first.time - killed_at, 2), last.step - first.step + 1)


def _settled(record: Record, num_attempts: int, *, seconds: float) -> Record | None:
    """Returns the record once that many attempts have taken steps, and the last one has for so
    long."""
    if len({step.attempt for step in record.steps}) < num_attempts:
        return None
    own = [step for step in record.steps if step.attempt == record.steps[-1].attempt]
    return record if own[-1].time - own[0].time >= seconds else None


def _wait(look: Callable[[], Record | None]) -> Record:
    deadline = time.monotonic() + WAIT_S
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no recovery in {WAIT_S:.0f} s")
        time.sleep(0.02)
    return found


def run_config(folder: Path) -> RunConfig:
    corpus = number_texts(folder / "corpus", num_words=2000)
    values = {
        "run_id": "killed",
        "model": {"preset": "demo"},
        "data": {"source": str(corpus), "vocab_size": VOCAB, "val_fraction": 0.2},
        "train": {
            "max_tokens": 1_000_000 * BATCH * SEQ_LEN,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // NUM_WORKERS,
            "seq_len": SEQ_LEN,
            "eval_every_steps": 1_000_000,
            "precision": "fp32",  # as the stock trainer's
        },
        "scaling": {"min_workers": NUM_WORKERS, "max_workers": NUM_WORKERS},
        "storage": {"uri": str(folder / "storage")},
    }
    return validate_config(values, RunConfig)


@contextmanager
def raymill_training(cluster: LocalCluster, config: RunConfig) -> Iterator[list[StageFailedError]]:
    """Trains while the context lasts. Yields a list that has the error once the run has ended by
    itself."""
    connection = Connection(cluster.jobs_api, cluster)
    failures: list[StageFailedError] = []

    def train() -> None:
        try:
            run_stage(connection, "jobs.pretrain", config)
        except StageFailedError as error:  # it is stopped below
            failures.append(error)

    thread = Thread(target=train, daemon=True)
    thread.start()
    try:
        yield failures
    finally:
        client = JobSubmissionClient(connection.api.url, headers=connection.api.headers)
        for job in client.list_jobs():
            if job.submission_id:
                client.stop_job(job.submission_id)
        thread.join(60)


@contextmanager
def stock_training(cluster: LocalCluster, folder: Path) -> Iterator[None]:
    model = dataclasses.replace(GPTConfig(**preset_fields({"preset": "demo"})), vocab_size=VOCAB)
    settings = {
        "storage": str(folder / "stock"),
        "log": str(folder / "stock.jsonl"),
        "num_workers": NUM_WORKERS,
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "model": dataclasses.asdict(model),
    }
    command = [sys.executable, "-m", "tests.benchmarks.stock_trainer", json.dumps(settings)]
    environment = (
        os.environ
        | cluster.environment
        | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(REPOSITORY)}
    )
    with (folder / "stock.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def measure(*, num_kills: int = 10, seed: int = 0) -> dict[str, Any]:
    """Prints the figures after `num_kills` seeded kills of each; seconds are medians unless they
    say maximum."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="raymill-recovery-") as scratch:
        folder = Path(scratch)
        config = run_config(folder)
        with LocalCluster(num_nodes=3, cpus_per_node=NUM_WORKERS) as cluster:
            ledger = folder / "storage/runs/killed/ledger.jsonl"
            with raymill_training(cluster, config):
                own = kill_workers(
                    lambda: raymill_record(ledger), num_kills=num_kills, rng=rng, name="raymill"
                )
            with stock_training(cluster, folder):
                log = folder / "stock.jsonl"
                stock = kill_workers(
                    lambda: stock_record(log), num_kills=num_kills, rng=rng, name="stock"
                )
    return {
        "median_recovery_s": statistics.median(kill.recovery_s for kill in own),
        "max_recovery_s": max(kill.recovery_s for kill in own),
        "stock_recovery_s": statistics.median(kill.recovery_s for kill in stock),
        "stock_max_recovery_s": max(kill.recovery_s for kill in stock),
        "max_lost_steps": max(kill.lost_steps for kill in own),
        "stock_max_lost_steps": max(kill.lost_steps for kill in stock),
        "num_kills": num_kills,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(measure(num_kills=arguments.num_kills, seed=arguments.seed)))


if __name__ == "__main__":
    main()
