"""`raymill serve` as a process on local nodes of its own, with the processes that tests and
benchmarks end."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.local.local_cluster import free_port
from tests.command_line import RAYMILL, environment
from tests.time_limits import limit_s

MODEL = "tiny"  # the name under which it is served
PROXY, CONTROLLER = "ray::ProxyActor", "ray::ServeController"
COORDINATOR, REPLICA = "ray::ServeReplica:raymill:Coordinator", "ray::ServeReplica:raymill:Replica"


@dataclass(frozen=True)
class ServeCommand:
    """The command while it serves."""

    url: str
    process: subprocess.Popen[str]
    log: Path  # of what it said

    def ended(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = 60) -> int:
        """Ends it by a signal. Returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(limit_s(timeout_s))


@contextmanager
def serve_command(checkpoint: Path, folder: Path, *words: str) -> Iterator[ServeCommand]:
    """Serves the checkpoint until the context is left; `words` are further flags. Its files are in
    the folder."""
    command = [
        *RAYMILL,
        "serve",
        str(checkpoint),
        "--port",
        str(free_port()),
        "--model-name",
        MODEL,
        "--json",
        *words,
    ]
    log = folder / "serve.log"
    with log.open("ab") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=said, text=True
        )
    try:
        assert process.stdout is not None
        result = process.stdout.readline()
        assert result, log.read_text()
        yield ServeCommand(json.loads(result)["url"], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(limit_s(30))
            except subprocess.TimeoutExpired:
                process.kill()  # its nodes end with it
                process.wait()


def killed(victim: psutil.Process) -> None:
    """Kills a process, and waits until it has ended."""
    victim.kill()
    psutil.wait_procs([victim], timeout=limit_s(10))
