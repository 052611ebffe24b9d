"""Tokenizing under SIGKILL of a worker, a node and the driver at random moments: always the same
bytes.

Everything is real: raylets, Ray Data, SIGKILL. A seed draws the moment and the victim; the fast
suite tries one, the slow one three of each kind.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cluster.local.local_cluster import LocalCluster
from cluster.settings.run import write_config
from cluster.stages.stage_module import parse_result
from cluster.storage.uris import open_storage
from tests.fault_seeds import fault_seeds
from tests.jobs.corpora import data_config, make_corpus
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

SETTINGS: dict[str, Any] = {
    "near_dedup_threshold": 0.8,
    "decontaminate_ngram": 13,
    "shard_bytes": 15_000,
    "selection_task_bytes": 30_000,  # several sections and partitions
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_nodes=3, cpus_per_node=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def start(cluster: LocalCluster, corpus: Path, folder: Path) -> subprocess.Popen[str]:
    write_config(data_config(str(corpus), folder / "storage", **SETTINGS), folder / "run.yaml")
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.tokenize_corpus", str(folder / "run.yaml")],
        env=os.environ
        | cluster.environment
        | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> dict[str, Any]:
    output, log = job.communicate(timeout=limit_s(120))
    results = [found for line in output.splitlines() if (found := parse_result(line))]
    assert job.returncode == 0, f"the log ends:\n{log[-6000:]}"
    assert results
    result = dict(results[-1])
    folder = Path(result.pop("manifest")).parent
    tables = {path.name: path.read_bytes() for path in folder.glob("*.docs")}
    assert len(tables) == len(result["shards"])
    return result | tables | {"list of documents": (folder / "documents.json").read_bytes()}


def is_outlived(job: subprocess.Popen[str]) -> bool:
    """Reports whether the driver survives a node's death: it ends with the node that it is attached
    to, which is any one where all share an address."""
    try:
        return job.wait(timeout=limit_s(10)) == 0
    except subprocess.TimeoutExpired:
        return True


def wait_for_progress(folder: Path, *, files: int) -> None:
    """Waits until the store holds so many files: indexes, decisions, shards."""
    storage = open_storage(str(folder / "storage"))
    wait_until(
        lambda: len(storage.list("tokens/")) >= files,
        poll_s=0.01,
        why=lambda: "the job wrote nothing",
    )


def workers_of(cluster: LocalCluster) -> list[psutil.Process]:
    """Returns the node's workers without its agents, with which it would die."""
    own = [
        child
        for node in cluster._nodes.values()
        for child in psutil.Process(node.pid).children(recursive=True)
    ]
    titles = {process: " ".join(process.cmdline()[:1]) for process in own if process.is_running()}
    return [
        process
        for process, title in titles.items()
        if title.startswith("ray::") and "Agent" not in title
    ]


class Contest(NamedTuple):
    """A run that another one wanted to join."""

    first_pid: int
    first: dict[str, Any]  # its result
    second_code: int
    second_log: str


@pytest.fixture(scope="module")
def contest(
    cluster: LocalCluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Contest:
    """The first run of the module, which nothing kills; a second one is started into its store."""
    folder = tmp_path_factory.mktemp("contest")
    first = start(cluster, corpus, folder)
    wait_for_progress(folder, files=5)
    first.send_signal(signal.SIGSTOP)  # it holds the store whatever the machine's speed
    try:
        second = start(cluster, corpus, folder)
        time.sleep(1)
        first.send_signal(signal.SIGCONT)
        _, log = second.communicate(timeout=limit_s(60))
    finally:
        first.send_signal(signal.SIGCONT)
    return Contest(first.pid, finish(first), second.returncode, log)


def test_two_runs_into_one_store_are_refused(contest: Contest) -> None:
    assert contest.second_code == 1
    assert f"{contest.first_pid} on" in contest.second_log
    assert "Traceback" not in contest.second_log
    assert contest.first["documents"]


def seeds() -> list[Any]:
    return [
        pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.chaos] if seed > 0 else [])
        for seed in fault_seeds(3)
    ]


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize(
    "victim", ["worker", pytest.param("node", marks=pytest.mark.slow), "driver"]
)
def test_a_kill_changes_no_byte(
    cluster: LocalCluster, corpus: Path, contest: Contest, victim: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{victim} {seed}")
    job = start(cluster, corpus, tmp_path)
    wait_for_progress(tmp_path, files=rng.randrange(3, 150))
    if victim == "driver":
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert not list((tmp_path / "storage").glob("tokens/*/manifest.json"))
        before = {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "storage").glob("tokens/*/shard-*.bin")
        }
        result = finish(start(cluster, corpus, tmp_path))
        assert {path: path.stat().st_mtime_ns for path in before} == before, (
            "a shard was made twice"
        )
    elif victim == "node":
        cluster.kill_node(rng.choice(cluster.node_names[1:]))
        cluster.add_node(wait=False)
        result = finish(job) if is_outlived(job) else finish(start(cluster, corpus, tmp_path))
    else:
        for process in rng.sample(workers := workers_of(cluster), min(1, len(workers))):
            process.kill()
        result = finish(job)
    assert result == contest.first, f"victim {victim}, seed {seed}"
