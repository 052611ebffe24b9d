"""Runs a stage as the process of a job: `python -m cluster.stages.run_mirrored --job NAME
jobs.pretrain run.yaml`.

What the stage and its workers print goes to this process's own output and, as it comes, into the
run's storage (`job_log`), even from a stage that was killed or crashed. While the stage runs, this
process holds the lease `jobs/<stage>.lease`, so a run has each stage once, however often it is
submitted.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cluster.output.job_log import JOBS, Ended, JobLog, LogReader, Started, launches
from cluster.output.progress import PlainProgress, say
from cluster.settings.parser import ConfigError, Parser
from cluster.stages.stage_module import FINAL, MISUSED, parse_result, stage_name
from cluster.storage.lease import Lease, LeaseHeldError
from cluster.storage.process_identity import die_with_parent
from cluster.storage.uris import Storage, StorageError, open_storage
from raymill.errors import UserError

_LINE_BYTES = 64 << 10  # longer ones are cut into several
_PIPE_TIMEOUT_S = 5.0  # a process that outlives the stage may hold the pipe open
_BEAT_S = 5.0
COMMAND_VARIABLE = "RAYMILL_CONTINUED_BY"
"""Environment variable of a stage with the line that a person types to continue it, if known."""

SILENCE_S = 20.0
"""Silence after which the holder of a stage's lease counts as dead on other machines."""


def main() -> int:
    try:
        parser = Parser(prog="python -m cluster.stages.run_mirrored", description=__doc__)
        parser.add_argument(
            "--job", default="", metavar="NAME", help="the job's name in the cluster"
        )
        parser.add_argument(
            "--command", default="", metavar="LINE", help="what a person types to continue it"
        )
        parser.add_argument("module", help="the stage's module")
        parser.add_argument("config", help="the resolved run.yaml")
        arguments = parser.parse_args()
        # Not by the settings' classes, which would take half a second; the stage checks them
        # anyway.
        values = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values.get("run_id"):
            raise ConfigError(
                f"{Path(arguments.config)} names no run_id, by which a restarted job finds its run"
            )
        storage = open_storage((values.get("storage") or {}).get("uri", ".raymill"))
        run = storage.child(f"runs/{values['run_id']}")
        stage = stage_name(arguments.module)
        if (code := hopeless_end(run, arguments.job)) is not None:
            say(
                f"error: {arguments.job} has ended by an error that no other attempt mends; `raymill logs` shows it"
            )
            return code
        with Lease(run, lease_key(stage), interval_s=_BEAT_S, timeout_s=SILENCE_S):
            started = Started(
                arguments.job, stage, socket.gethostname(), time.time(), arguments.command
            )
            launch = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
            command = [sys.executable, "-m", arguments.module, arguments.config]
            return _mirror(
                command, JobLog(run, launch, started), asked=lambda: run.exists(stop_key(launch))
            )
    except LeaseHeldError as error:
        say(f"error: this run's {stage} runs already: {error}")
        return 1
    except UserError as error:
        say(f"error: {error}")
        return MISUSED if isinstance(error, ConfigError) else 1


def entrypoint(module: str, path: str, *, job: str, command: str = "") -> list[str]:
    """Returns the command of a job; `command` is what a person types to continue it, if known."""
    known = [f"--command={command}"] if command else []
    return ["python", "-m", "cluster.stages.run_mirrored", "--job", job, *known, module, path]


def stop_key(launch: str) -> str:
    """Returns the key of the file by which anybody with access to the storage asks a launch to save
    and end."""
    return f"{JOBS}/{launch}/stop"


def hopeless_end(run: Storage, job: str) -> int | None:
    """Returns the exit code with which an earlier launch of the job said that another one would
    fail too.

    KubeRay starts a job that failed again, on a new cluster each time, whatever it failed of. A
    name is given once, so a job that is submitted again has another one.
    """
    if not job:
        # One that was not submitted by `raymill submit`, and has no name that is its own
        return None
    for launch in reversed(launches(run)):
        reader = LogReader(run, launch)
        if reader.started().job == job:
            ended = reader.ended()
            return ended.exit_code if ended and ended.exit_code in FINAL else None
    return None


def lease_key(stage: str) -> str:
    """Returns the key of the lease whose holder runs the stage."""
    return f"{JOBS}/{stage}.lease"


def _mirror(command: list[str], log: JobLog, *, asked: Callable[[], bool]) -> int:
    """Runs the command to its end, which a signal or `asked` may hasten, and returns its exit code
    as a shell would."""
    was_asked_to_stop = threading.Event()
    # Ray stops a job by signaling each of its processes, including the stage: this one only waits
    # for it.
    signal.signal(signal.SIGTERM, lambda number, frame: was_asked_to_stop.set())
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {COMMAND_VARIABLE: log.started.command}
    child = subprocess.Popen(command, **pipes, env=environment, preexec_fn=die_with_parent)  # noqa: PLW1509 (one system call)
    results: list[dict[str, Any]] = []
    reader = threading.Thread(
        target=_pass_on, args=(child, log, results), name="reader", daemon=True
    )
    reader.start()
    has_ended = threading.Event()
    asker = threading.Thread(
        target=_pass_request_on, args=(child, asked, was_asked_to_stop, has_ended), daemon=True
    )
    asker.start()
    code = child.wait()
    has_ended.set()
    reader.join(_PIPE_TIMEOUT_S)
    code = 128 - code if code < 0 else code
    result = results[-1] if results and code == 0 else None
    log.close(Ended(code, was_asked_to_stop.is_set(), result, time.time()))
    return code


def _pass_request_on(
    child: "subprocess.Popen[bytes]",
    asked: Callable[[], bool],
    was_asked: threading.Event,
    has_ended: threading.Event,
) -> None:
    """Signals the child once there is a request in the storage, as Ray does for its own."""
    while not has_ended.wait(_BEAT_S):
        with suppress(StorageError):  # an outage, which the stage itself reports
            if asked():
                was_asked.set()
                child.terminate()
                return


def _pass_on(child: "subprocess.Popen[bytes]", log: JobLog, results: list[dict[str, Any]]) -> None:
    assert child.stdout is not None, "its output is piped"
    progress = PlainProgress()
    while raw := child.stdout.readline(_LINE_BYTES):
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
        text: str | None = (line := raw.decode(errors="replace").rstrip("\n"))
        with suppress(ValueError):  # a line that is cut, or mixed with another: kept as it is
            if (result := parse_result(line)) is not None:
                results.append(result)
                continue
            text = progress.line(line)
        if text is not None:
            log.write(f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
