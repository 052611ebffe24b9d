"""A Ray cluster of several real raylets on this machine: loopback only, token auth, one process
group per node.

Ray binds a node's processes to the life of its `ray start --block`, and that is bound to the life
of this process: nothing outlives its owner for long, even one that was killed, and nothing that
this module did not start is signaled. The head keeps the cluster's state on disk, so that it can be
restarted: other nodes find it, and their actors live on.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from cluster.local.jobs_api import ClusterError, JobsApi, Token
from cluster.output.progress import doing, say
from cluster.output.result_text import counted, printable
from cluster.settings.run import RunConfig
from cluster.settings.stages import EvaluateConfig, IndexConfig
from cluster.storage.process_identity import die_with_parent, kill, with_descendants
from model.hardware.processor import num_gpus_here
from raymill.errors import UserError

NODE_NAME_VARIABLE = "RAYMILL_NODE"
"""Environment variable with the node's name, in every process on a local node."""

STOP_WAIT_S = 30
"""Seconds that a job has to save after SIGTERM, before it is killed; Ray's default is 3."""

_HEAD = "head"
_START_NODE = Path(__file__).resolve().with_name("start_node.py")
_MAX_STARTS = 3
# For each of them; a node takes 5 to 15 s on two free cores, 60 s on busy ones
_START_TIMEOUT_S = 120.0
_SAY_EVERY_S = 15.0
_BUSY_LOAD = 2.0  # processes that want each CPU
_LITTLE_MEMORY_BYTES = 1 << 30
_STOP_TIMEOUT_S = 5.0
_END_BY_ITSELF_S = 2.0  # a node whose head has gone first would wait longer for it
_HEAD_ENDS_S = 5.0
_OBJECT_STORE_BYTES = 256 << 20

PATIENT_WORKERS = {
    # Workers add this to their owner's niceness. Ray's 15 leaves a worker a thirtieth of a core
    # that any other program wants too: whatever else the machine does would halt training, serving,
    # and the start of both.
    "RAY_worker_niceness": "0",
    # Of 60 s, after which a worker that starts on busy cores is killed
    "RAY_worker_register_timeout_seconds": "240",
}
"""Environment of a Ray whose machine does other things too."""

_LOCAL_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps addresses on loopback, see start_node.py
    "RAY_gcs_server_port_wait_time_s": "120",  # of 20 s, which busy cores make too few
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    # Ray's defaults take 14 s to see a killed raylet and 65 s to see a hung one. A killed raylet
    # refuses the connection at once, so three short periods name it dead; the long timeout spares a
    # node that is merely busy.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_COLOR_PREFIX": "0",
    # Its nodes are one machine: an endpoint's proxy of one node has no reason to send requests to
    # that node's replicas.
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    # Never: a proxy whose node has lost its last replica would be ended, but it shares its port
    # with others and gets new connections until then.
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1e9",
    # Of 5 s, which a proxy that starts on busy cores misses
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a local cluster besides."""

_CHOSEN_BY_HAND = range(20000, 32768)
"""Linux gives connections ports from 32768 on (ip_local_port_range), and other systems higher
ones."""


def free_port(promised: Collection[int] = ()) -> int:
    """Returns a TCP port of the loopback interface on which nothing listens, except the promised
    ones. No connection is given it by itself, so that it is still free when the listener that it is
    meant for starts."""
    while True:
        port = _CHOSEN_BY_HAND.start + secrets.randbelow(len(_CHOSEN_BY_HAND))
        if port in promised:
            continue
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def require_free_port(host: str, port: int) -> None:
    """Raises `UserError` if another process listens already: Ray Serve's proxy would share the port
    with it (SO_REUSEPORT), and each get some of the requests."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections that linger do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None
            raise UserError(
                f"port {port} on {host} is in use by another process; end it, or choose another --port"
            ) from None


class LocalCluster:
    """Starts on entering the context, ends on leaving it. The head carries no work unless it is the
    only node."""

    def __init__(
        self, *, num_nodes: int, cpus_per_node: int, num_gpus: int = 0, gpus_together: int = 1
    ) -> None:
        """The nodes that carry work share the machine's first `num_gpus` GPUs; a node gets a multiple
        of `gpus_together`."""
        self._num_nodes = num_nodes
        self._cpus_per_node = cpus_per_node
        self._free_gpus = _visible_gpus()[:num_gpus] if num_gpus else []
        self._gpus_per_node = gpus_per_node(num_gpus, num_nodes, together=gpus_together)
        self._gpus: dict[str, list[str]] = {}  # of each node
        # 0700; Ray's socket paths must stay short
        self._directory = Path(tempfile.mkdtemp(prefix="raymill-"))
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._flags: dict[str, list[str]] = {}  # of `ray start`
        self._joined: set[str] = set()  # ids of nodes that were waited for
        self._is_ending = False
        # The kernel ends a node with the very thread that started it, so that thread must last as
        # long as the cluster.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="node-starter")
        self._ports: set[int] = set()  # Ray refuses to start if two of its parts get the same one
        self._gcs_port, self._jobs_port = self._new_port(), self._new_port()
        self.address = f"127.0.0.1:{self._gcs_port}"  # for `ray.init`
        self.jobs_url = f"http://127.0.0.1:{self._jobs_port}"
        self.token = secrets.token_hex(32)
        self.jobs_api = JobsApi(self.jobs_url, Token(self.token, "the local cluster"))
        interpreter = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment: dict[str, str] = {
            **PATIENT_WORKERS,
            **_LOCAL_RAY,
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            "RAY_AUTH_TOKEN_PATH": str(self._directory / "token"),
            "PATH": interpreter,
        }
        """Variables that a process needs to join, before it imports ray, which reads them once."""

    @property
    def node_names(self) -> list[str]:
        """The running nodes, the head first."""
        return [name for name, process in self._nodes.items() if process.poll() is None]

    def lost_head(self) -> bool:
        """Says whether the head has ended, or does within seconds: it ends a moment after one of
        its processes."""
        deadline_s = time.monotonic() + _HEAD_ENDS_S
        while _HEAD in self.node_names:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.25)
        # Another thread may end the cluster meanwhile; a new head would outlive that
        return not self._is_ending

    def __enter__(self) -> Self:
        token_path = Path(self.environment["RAY_AUTH_TOKEN_PATH"])
        token_path.touch(mode=0o600)
        token_path.write_text(self.token)
        try:
            with doing(f"starting a local cluster of {counted(self._num_nodes, 'node')}"):
                self._start_head()
                self._wait([self.add_node(wait=False) for _ in range(self._num_nodes - 1)])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def add_node(self, *, wait: bool = True) -> str:
        """Starts one more worker node and returns its name."""
        name = f"node-{len(self._flags)}"
        self._flags[name] = ["--address", self.address, "--num-cpus", str(self._cpus_per_node)]
        self._lend_gpus(name)
        self._launch(name)
        if wait:
            self._wait([name])
        return name

    def kill_node(self, name: str) -> None:
        """Kills the node: its raylet, its workers and all that they hold are gone at once."""
        process = self._nodes.pop(name)
        self._free_gpus += self._gpus.pop(name, [])
        process.kill()  # the kernel then kills the raylet, whose end kills the workers
        process.wait(_STOP_TIMEOUT_S)

    def restart_head(self) -> None:
        """Starts a new head at the addresses and with the state of the lost one, whose jobs are
        gone."""
        self._clear(_HEAD)
        self._start_head()
        self._nodes = {_HEAD: self._nodes.pop(_HEAD)} | self._nodes

    def _clear(self, name: str) -> None:
        """Ends what is left of a node before another one of the same name starts."""
        # Found by the environment that they were given, even a driver that does not know yet, and
        # would hold its lease.
        mine = {
            NODE_NAME_VARIABLE: name,
            "RAY_AUTH_TOKEN_PATH": self.environment["RAY_AUTH_TOKEN_PATH"],
        }
        running = psutil.process_iter(["environ"])  # which is None for another user's
        kill(
            [
                process
                for process in running
                if mine.items() <= (process.info["environ"] or {}).items()
            ]
        )
        # With this file `ray start` would take the other nodes for a cluster whose head runs.
        (self._directory / name / "ray_current_cluster").unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends every process of the nodes, gently at first, and removes the cluster's files."""
        self._is_ending = True
        started = [
            process for node in self._nodes.values() for process in with_descendants(node.pid)
        ]
        for node in self._nodes.values():
            node.terminate()
        _, remaining = psutil.wait_procs(started, timeout=_END_BY_ITSELF_S)
        kill(remaining)
        for node in self._nodes.values():
            node.wait()
        self._nodes.clear()
        self._starter.shutdown()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _new_port(self) -> int:
        self._ports.add(port := free_port(self._ports))
        return port

    def _start_head(self) -> None:
        flags = ["--head", "--dashboard-host", "127.0.0.1", "--port", str(self._gcs_port)]
        # No autoscaler, as nodes are added by hand
        flags += ["--dashboard-port", str(self._jobs_port), "--no-monitor"]
        self._flags[_HEAD] = [
            *flags,
            "--num-cpus",
            str(self._cpus_per_node if self._num_nodes == 1 else 0),
        ]
        if self._num_nodes == 1 and _HEAD not in self._gpus:
            self._lend_gpus(_HEAD)
        self._launch(_HEAD)
        self._wait([_HEAD])

    def _lend_gpus(self, name: str) -> None:
        self._gpus[name] = self._free_gpus[: self._gpus_per_node]
        del self._free_gpus[: self._gpus_per_node]

    def _launch(self, name: str) -> None:
        command = [
            sys.executable,
            str(_START_NODE),
            "start",
            "--block",
            "--disable-usage-stats",
            "--node-name",
            name,
        ]
        gpus = self._gpus.get(name, [])
        command += ["--node-ip-address", "127.0.0.1", "--num-gpus", str(len(gpus))]
        command += ["--object-store-memory", str(_OBJECT_STORE_BYTES), "--log-color", "false"]
        # Port 0 lets each worker process take any free one: several nodes share one address here.
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--dashboard-agent-listen-port", str(self._new_port())]
        # Each has its own session folder: nodes that start together would race for the names of
        # their sockets.
        command += ["--temp-dir", str(self._directory / name)]
        state = {
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self._directory / "state"),
        }
        with self._log(name).open("ab") as log:
            self._nodes[name] = self._starter.submit(
                subprocess.Popen,
                [*command, *self._flags[name]],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | self.environment
                | {NODE_NAME_VARIABLE: name}
                # Each node's workers take its GPUs by their place in this list
                | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
                | (state if name == _HEAD else {}),
                start_new_session=True,
                preexec_fn=die_with_parent,
            ).result()

    def _alive_nodes(self) -> dict[str, str]:
        """Returns ids and names of the nodes that the head counts as alive, including one that was
        just killed."""
        try:
            nodes = self.jobs_api.alive_nodes()
        except ClusterError:  # the dashboard is not up yet
            return {}
        return {node["node_id"]: node["node_name"] for node in nodes}

    def _wait(self, names: Collection[str]) -> None:
        """Waits until the nodes are alive. One that ends or is late is started again, as a machine
        that was busy at the time is the usual reason: Ray ends a node that takes over 30 s. Raises
        `ClusterError`."""
        began_s = said_s = time.monotonic()
        launched_s = dict.fromkeys(names, began_s)
        num_starts = dict.fromkeys(names, 1)
        while True:
            alive, now_s = self._alive_nodes(), time.monotonic()
            # A new head first counts its predecessor too, until that one's health checks have
            # failed.
            ids = {name: [node_id for node_id in alive if alive[node_id] == name] for name in names}
            late = [name for name in names if len(ids[name]) != 1 or ids[name][0] in self._joined]
            if not late:
                self._joined |= alive.keys()
                return
            for name in late:
                if self._nodes[name].poll() is not None:
                    problem = "ended while starting"
                elif now_s > launched_s[name] + _START_TIMEOUT_S:
                    problem = f"was not there after {_START_TIMEOUT_S:.0f} s"
                else:
                    continue
                problem = f"the local cluster's {name} {problem}"
                if num_starts[name] == _MAX_STARTS:
                    raise ClusterError(f"{problem}, {_MAX_STARTS} times. {self._last_words(name)}")
                said = f" and said: {words}" if (words := _last_words(self._log(name))) else ""
                say(f"{problem}{said}; it is started again")
                num_starts[name] += 1
                self._clear(name)
                self._launch(name)
                launched_s[name] = said_s = time.monotonic()
            if now_s > said_s + _SAY_EVERY_S:
                said_s = now_s
                say(
                    f"waiting for the local cluster's {', '.join(late)} since {now_s - began_s:.0f} s; {_load()}"
                )
            time.sleep(0.25)

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _last_words(self, name: str) -> str:
        """Returns a node's own reason to end, the machine's likely one, and where the log is
        kept."""
        # The cluster's folder is removed
        handle, kept = tempfile.mkstemp(prefix=f"raymill-{name}-", suffix=".log")
        os.close(handle)
        shutil.copyfile(self._log(name), kept)
        said = (
            f"It said: {words}. "
            if (words := _last_words(self._log(name)))
            else "It said nothing. "
        )
        return f"{said}Now {_load()}. Its log is {kept}"


def gpus_per_node(num_gpus: int, num_nodes: int, *, together: int = 1) -> int:
    """Returns how many of this machine's GPUs each local node that carries work is lent: a multiple
    of a worker's own number."""
    worker_nodes = max(1, num_nodes - 1)
    return -(-num_gpus // (worker_nodes * together)) * together


def _visible_gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(num_gpus_here())]


def _last_words(log: Path) -> str:
    """Returns the line of a log that says why its process ended: the last with an error, else the
    last."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1].strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return printable((errors or lines or [""])[-1], keep="")[:300].rstrip(". ")


def _load() -> str:
    """Returns how busy the machine is, in words."""
    num_cpus, load, free_bytes = (
        os.cpu_count() or 1,
        os.getloadavg()[0],
        psutil.virtual_memory().available,
    )
    is_overloaded = load > _BUSY_LOAD * num_cpus or free_bytes < _LITTLE_MEMORY_BYTES
    words = f"{load:.1f} processes want its {num_cpus} CPUs and {free_bytes / 1e9:.1f} GB of memory are free"
    return f"the machine is {'' if is_overloaded else 'not '}overloaded: {words}"


def cpus_per_node(config: RunConfig | EvaluateConfig | IndexConfig) -> int:
    """Returns the logical CPUs of each local node: enough that the workers still fit with one node
    fewer."""
    worker_nodes = max(1, config.cluster.num_nodes - 1)
    if isinstance(config, IndexConfig):
        return -(-config.num_workers // worker_nodes)
    if isinstance(config, EvaluateConfig):
        return -(-config.num_workers // worker_nodes) * config.threads_per_worker
    return -(-config.scaling.max_workers // worker_nodes) * config.scaling.threads_per_worker
