"""The local cluster, with real raylets: out of others' reach, nodes come and go, and nothing
outlives its owner."""

import io
import ipaddress
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.local.jobs_api import ClusterError
from cluster.local.local_cluster import (
    NODE_NAME_VARIABLE,
    LocalCluster,
    free_port,
    require_free_port,
)
from cluster.storage.process_identity import kill
from raymill.errors import UserError
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def alive_nodes(cluster: LocalCluster) -> set[str]:
    """Ids of the nodes that the head counts as alive, asked as anyone with the token may."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    answer = httpx.get(
        f"{cluster.jobs_url}/api/v0/nodes", headers=headers, timeout=limit_s(30)
    ).raise_for_status()
    nodes: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
    return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}


def started_since(before: set[psutil.Process]) -> list[psutil.Process]:
    return [
        process for process in psutil.Process().children(recursive=True) if process not in before
    ]


def looked_at(
    before: set[psutil.Process], look: Callable[[psutil.Process], Any]
) -> list[tuple[psutil.Process, Any]]:
    """Returns the cluster's processes and what `look` finds; one may end, and be a zombie, while it
    is looked at."""
    found = []
    for process in started_since(before):
        with suppress(psutil.Error):
            found.append((process, look(process)))
    return found


def of_node(name: str, before: set[psutil.Process]) -> list[psutil.Process]:
    """Returns the processes of a node that run."""
    return [
        process
        for process, variables in looked_at(before, psutil.Process.environ)
        if variables.get(NODE_NAME_VARIABLE) == name
    ]


@pytest.fixture(scope="module")
def before() -> set[psutil.Process]:
    """This process's children that are not the cluster's."""
    return set(psutil.Process().children(recursive=True))


class Unlucky(LocalCluster):
    """Loses its worker node at the first start, as a machine without memory does."""

    def _launch(self, name: str) -> None:
        is_first = name not in self._nodes
        super()._launch(name)
        if is_first and name == "node-1":
            self._nodes[name].kill()


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    """Holds what the cluster printed while it started."""
    return io.StringIO()


@pytest.fixture(scope="module")
def cluster(before: set[psutil.Process], said: io.StringIO) -> Iterator[LocalCluster]:
    with ExitStack() as stack:
        with redirect_stderr(said):
            cluster = stack.enter_context(Unlucky(num_nodes=2, cpus_per_node=1))
        yield cluster


def test_a_node_that_is_lost_while_it_starts_is_started_once_more(
    cluster: LocalCluster, said: io.StringIO
) -> None:
    assert cluster.node_names == ["head", "node-1"]
    assert (
        "the local cluster's node-1 ended while starting; it is started again\n" in said.getvalue()
    )


def test_it_is_out_of_others_reach(cluster: LocalCluster, before: set[psutil.Process]) -> None:
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")  # IPv4 on a socket for both
        for _, connections in looked_at(before, lambda process: process.net_connections("inet"))
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(ipaddress.ip_address(ip).is_loopback for ip in listening), listening

    token_path = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    assert token_path.read_text() == cluster.token
    assert len(cluster.token) >= 32
    assert stat.S_IMODE(token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(token_path.parent.stat().st_mode) == 0o700
    command_lines = looked_at(before, psutil.Process.cmdline)
    assert command_lines
    # Everyone may read those
    assert not any(cluster.token in " ".join(words) for _, words in command_lines)


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}], ids=["no token", "wrong token"]
)
def test_jobs_need_the_token(cluster: LocalCluster, headers: dict[str, str]) -> None:
    url = f"{cluster.jobs_url}/api/jobs/"
    assert httpx.get(url, headers=headers, timeout=limit_s(30)).status_code in (401, 403)
    assert httpx.post(
        url, headers=headers, json={"entrypoint": "true"}, timeout=limit_s(30)
    ).status_code in (401, 403)
    right = {"Authorization": f"Bearer {cluster.token}"}
    assert httpx.get(url, headers=right, timeout=limit_s(30)).json() == []


def test_workers_have_the_niceness_of_their_owner(
    cluster: LocalCluster, before: set[psutil.Process]
) -> None:
    """Workers of Ray's own settings are 15 above it: whatever else the machine does would halt
    training and serving."""
    url, headers = f"{cluster.jobs_url}/api/jobs/", {"Authorization": f"Bearer {cluster.token}"}
    task = "import ray, time; ray.init(); ray.get(ray.remote(lambda: time.sleep(86399)).remote())"
    asked = {"entrypoint": f"python -c '{task}'", "submission_id": "sleeper"}
    httpx.post(url, headers=headers, json=asked, timeout=limit_s(60)).raise_for_status()

    def workers() -> list[psutil.Process]:
        return [
            process
            for process, name in looked_at(before, psutil.Process.name)
            if name.startswith("ray::<lambda>")
        ]

    wait_until(workers)
    assert {process.nice() for process in workers()} == {psutil.Process().nice()}
    httpx.post(f"{url}sleeper/stop", headers=headers, timeout=limit_s(60)).raise_for_status()


def test_nodes_come_and_go(cluster: LocalCluster, before: set[psutil.Process]) -> None:
    """A node that a thread added outlives the thread: the kernel would end it with its own
    starter."""
    assert cluster.node_names == ["head", "node-1"]
    first = alive_nodes(cluster)
    assert len(first) == 2

    adder = threading.Thread(target=cluster.add_node)
    adder.start()
    adder.join()
    assert cluster.node_names == ["head", "node-1", "node-2"]
    (added,) = alive_nodes(cluster) - first

    of_node_1 = of_node("node-1", before)
    assert "raylet" in {process.name() for process in of_node_1}
    cluster.kill_node("node-1")
    assert cluster.node_names == ["head", "node-2"]
    _, remaining = psutil.wait_procs(of_node_1, timeout=limit_s(20))
    assert remaining == []
    wait_until(lambda: len(alive_nodes(cluster)) == 2)
    assert added in alive_nodes(cluster)

    assert cluster.add_node() == "node-3"
    assert len(alive_nodes(cluster)) == 3


@pytest.mark.slow
def test_a_lost_head_is_started_again_and_finds_its_nodes(
    cluster: LocalCluster, before: set[psutil.Process]
) -> None:
    def pids() -> set[int]:
        at_head = of_node("head", before)
        names = looked_at(before, psutil.Process.name)
        return {
            process.pid for process, name in names if name == "raylet" and process not in at_head
        }

    assert not cluster.lost_head()
    names, others = cluster.node_names, pids()
    assert len(others) == len(names) - 1
    cluster.kill_node("head")
    assert cluster.lost_head()
    start_s = time.monotonic()
    cluster.restart_head()
    print(f"the head was back after {time.monotonic() - start_s:.1f} s")
    assert cluster.node_names == names
    assert pids() == others
    wait_until(lambda: len(alive_nodes(cluster)) == len(names))


def test_stop_leaves_nothing(cluster: LocalCluster, before: set[psutil.Process]) -> None:
    processes = started_since(before)
    assert len(processes) > 6
    cluster.stop()
    assert not any(process.is_running() for process in processes)
    assert started_since(before) == []
    assert not Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).parent.exists()
    assert cluster.node_names == []
    cluster.stop()  # once more is no error


AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Processes that report a killed raylet, for up to a minute, to a head that is gone too."""


@pytest.mark.parametrize("waits_for_agents", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_owner_leaves_nothing_running(waits_for_agents: bool) -> None:
    # Ray's socket paths must stay short, so not below tmp_path
    folder = tempfile.mkdtemp(prefix="own-")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": folder}
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.own_cluster"],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    agents: list[psutil.Process] = []
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith(b"127.0.0.1:")
        processes = psutil.Process(owner.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in processes}
        agents = [process for process in processes if process.name() in AGENTS]
        assert {process.name() for process in agents} == AGENTS
        owner.kill()
        assert owner.wait(limit_s(10)) == -signal.SIGKILL
        ending = (
            processes
            if waits_for_agents
            else [process for process in processes if process not in agents]
        )
        _, remaining = psutil.wait_procs(ending, timeout=limit_s(120 if waits_for_agents else 20))
        assert remaining == []
    finally:
        owner.kill()
        owner.wait()
        kill(agents)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last failure is one line with the node's own last words, the machine's state and a log
    that is kept."""
    children = set(psutil.Process().children(recursive=True))
    cluster = LocalCluster(num_nodes=1, cpus_per_node=1)
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")  # no Python starts with it
    with pytest.raises(ClusterError) as raised:
        cluster.__enter__()
    words = re.fullmatch(
        r"the local cluster's head ended while starting, 3 times\. "
        r"It said: ModuleNotFoundError: No module named 'encodings'\. Now the machine is (not )?overloaded: "
        r"[\d.]+ processes want its \d+ CPUs and [\d.]+ GB of memory are free\. Its log is (.*)",
        str(raised.value),
    )
    assert words, str(raised.value)
    log = Path(words[2])
    assert log.read_text().count("No module named 'encodings'") == 3
    log.unlink()
    said = "ended while starting and said: ModuleNotFoundError: No module named 'encodings'; it is started again\n"
    assert (
        capsys.readouterr().err
        == "starting a local cluster of 1 node\n" + 2 * f"the local cluster's head {said}"
    )
    assert started_since(children) == []
    assert not Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).parent.exists()


def test_no_free_port_is_one_that_was_promised() -> None:
    spare = free_port()
    promised = set(range(1 << 16)) - {spare, *(free_port() for _ in range(1000))}
    assert free_port(promised) not in promised


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_seen(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        with pytest.raises(UserError, match=f"port {port} on {host} is in use"):
            require_free_port(host, port)
    require_free_port(host, port)
