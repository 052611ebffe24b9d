"""The trace index by tasks of a real cluster: the same bytes for any number of workers, under
SIGKILL of a worker and of the driver."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local.local_cluster import LocalCluster
from cluster.settings.run import write_config
from cluster.settings.stages import IndexConfig
from cluster.stages.stage_module import parse_result
from cluster.storage.uris import open_storage
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.trace import build_index
from jobs.trace.build_index import index_store
from jobs.trace.trace_index import INDEX, TRACE
from tests.command_line import raymill
from tests.jobs.cleaning.in_process import InProcess
from tests.jobs.stores import make_store
from tests.local_ray import local_ray
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that is cut into many sections, and its index into several parts. The tasks, in
    other processes, have the module's own sizes, which the pieces that they get do not follow."""
    monkeypatch.setattr(build_index, "_SECTION_TOKENS", 1000)
    monkeypatch.setattr(build_index, "_PART_BYTES", 50_000)
    make_store(open_storage(str(tmp_path / "one")), sizes=(30_000, 11, 40_000), vocab_size=40)
    return tmp_path / "one"


def content_of(folder: Path) -> dict[str, bytes]:
    trace = folder / TRACE
    files = [path for path in trace.rglob("*") if path.is_file()]
    return {str(path.relative_to(trace)): path.read_bytes() for path in files}


def workers() -> list[psutil.Process]:
    """The processes of this test's own Ray that do tasks; its node would end with an agent."""
    known = psutil.Process().children(recursive=True)
    titles = {process: " ".join(process.cmdline()[:1]) for process in known if process.is_running()}
    return [
        process
        for process, title in titles.items()
        if title.startswith("ray::") and "Agent" not in title
    ]


def kill_workers(folder: Path, killed: list[int]) -> None:
    """Kills what works once some of it is stored, but not all."""
    wait_until(lambda: any((folder / TRACE).glob("*/sent/*")), poll_s=0.01)
    for process in workers():
        killed.append(process.pid)
        process.kill()


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_bytes_are_the_same_for_any_number_of_workers_and_killed_ones(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    whole, disturbed = (shutil.copytree(folder, tmp_path / name) for name in ("whole", "disturbed"))
    index_store(open_storage(str(folder)), run=InProcess())
    expected = content_of(folder)
    assert len(expected) > 3, "several parts"
    with local_ray(num_cpus=num_workers):
        index_store(open_storage(str(whole)), run=run_tasks)
        assert content_of(whole) == expected
        killed: list[int] = []
        killer = threading.Thread(target=kill_workers, args=(disturbed, killed))
        killer.start()
        index_store(open_storage(str(disturbed)), run=run_tasks)
        killer.join()
    assert killed
    assert content_of(disturbed) == expected


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_nodes=1, cpus_per_node=2) as cluster:
        yield cluster


def start(cluster: LocalCluster, store: Path, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    write_config(IndexConfig(store=str(store)), folder / "run.yaml")
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.index_store", str(folder / "run.yaml")],
        env=os.environ
        | cluster.environment
        | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stage_whose_driver_was_killed_goes_on_with_the_same_bytes(
    cluster: LocalCluster, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch:  # as a stage has them
        patch.setattr(build_index, "_SECTION_TOKENS", 1 << 24)
        patch.setattr(build_index, "_PART_BYTES", 64 << 20)
        index_store(open_storage(str(copy)), run=InProcess())
    killed = start(cluster, folder, tmp_path / "first")
    wait_until(
        lambda: any((folder / TRACE).rglob("section-*")) or killed.poll() is not None, poll_s=0.01
    )
    killed.send_signal(signal.SIGKILL)
    killed.wait(limit_s(30))
    job = start(cluster, folder, tmp_path / "second")
    output, log = job.communicate(timeout=limit_s(120))
    assert job.returncode == 0, log[-4000:]
    [result] = [value for line in output.splitlines() if (value := parse_result(line))]
    assert result["store"] == str(folder)
    assert "raymill-progress" in output + log
    assert content_of(folder) == content_of(copy)
    assert (folder / TRACE / INDEX).exists()


def test_the_command_indexes_a_store_on_a_local_cluster(folder: Path, tmp_path: Path) -> None:
    words = ["trace", "index", str(folder), "--num-workers", "2", "--json"]
    answers = []
    for _ in range(2):  # the second time there is nothing to do, and so no cluster
        done = raymill(*words, "--storage.uri", str(tmp_path / "storage"), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0] == answers[1]
    assert answers[0]["tokens"] == 70_011
    assert (folder / TRACE / INDEX).exists()
