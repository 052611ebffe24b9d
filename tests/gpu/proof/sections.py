"""The sections of a proof on GPUs: programs that run one after another, each in a process of its own,
with a time limit. One that fails does not stop the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.repository import REPOSITORY

State = Literal["passed", "failed", "out of time", "left out"]

TOTAL_S = 830.0
NUM_LINES = 80  # of a section's output, that are kept
_LEAST_S = 0.5  # no section is begun for less
_TINY = ("tests/gpu/test_state.py", "tests/gpu/test_bench_gpu.py")


@dataclass(frozen=True)
class Section:
    """A program, and what it is for. In its words `{folder}` is where it may write, `{gpus}` the
    number of GPUs, and `{seconds}` how long it may take."""

    name: str
    title: str
    says: str
    on_gpus: Sequence[str]  # this Python's arguments
    on_cpus: Sequence[str]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """What came of a section."""

    name: str
    title: str
    says: str
    state: State
    command: str
    exit_code: int | None = None
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)  # the last JSON object that it printed
    last_lines: Sequence[str] = ()

    def json(self) -> dict[str, Any]:
        return asdict(self)


SECTIONS = [
    Section(
        name="hashes",
        title="One hash for any number of workers",
        says="The SHA-256 of the final weights, by workers and by what they divide. Of several workers that "
        "share a card, messages go through the host; else over NCCL.",
        on_gpus=["-m", "tests.gpu.proof.hashes", "cuda", "{gpus}", "20"],
        on_cpus=["-m", "tests.gpu.proof.hashes", "cpu", "{gpus}", "6"],
        limit_s=180,
    ),
    Section(
        name="tests",
        title="Tests",
        says="make test-gpu: gradients against float64, bits of several ranks, memory, copies, NCCL's faults.",
        on_gpus=["-m", "pytest", "-q", "-m", "gpu", "--numprocesses", "0", "tests/gpu"],
        on_cpus=["-m", "pytest", "-q", "-m", "not gpu and not slow and not more", *_TINY],
        limit_s=200,
    ),
    Section(
        name="speed",
        title="Speed and memory of one card",
        says="make bench-gpu: raymill's step beside a plain loop, compiled as a whole, and Hugging Face's.",
        on_gpus=["-m", "tests.benchmarks.bench_gpu", "--seconds", "{seconds}"],
        on_cpus=[
            *("-m", "tests.benchmarks.bench_gpu", "--device", "cpu", "--tiny"),
            *("--seconds", "{seconds}", "--only", "exact", "exact again", "plain"),
        ],
        limit_s=180,
    ),
    Section(
        name="workers",
        title="Speed and memory of several workers",
        says="Each way to divide the state beside FSDP2, with as many workers as there are cards, and with one.",
        on_gpus=["-m", "tests.gpu.proof.speeds", "cuda", "{gpus}", "{seconds}"],
        on_cpus=["-m", "tests.gpu.proof.speeds", "cpu", "2", "{seconds}"],
        limit_s=130,
    ),
    Section(
        name="demo",
        title="The demo",
        says="A local cluster with scaling.use_gpu auto: training with a worker killed, the steps around the "
        "kill again, an endpoint that answers.",
        on_gpus=["-m", "tests.gpu.proof.demo", "{folder}"],
        on_cpus=["-m", "tests.gpu.proof.demo", "{folder}"],
        limit_s=140,
    ),
]


def run_sections(
    sections: Sequence[Section],
    *,
    num_gpus: int,
    folder: Path,
    patience: float = 1.0,
    tell: Callable[[str], None],
) -> list[Outcome]:
    """Runs all within `TOTAL_S`: those that come last may be left out. Patience multiplies each
    limit, for a slow machine."""
    deadline = time.monotonic() + patience * TOTAL_S
    outcomes: list[Outcome] = []
    for section in sections:
        tell(f"{section.name}: {section.title}")
        limit_s = min(patience * section.limit_s, deadline - time.monotonic())
        outcome = _run(section, num_gpus=num_gpus, folder=folder, limit_s=limit_s)
        tell(f"    {outcome.state}, {outcome.seconds:.0f} s")
        outcomes.append(outcome)
    return outcomes


def _run(section: Section, *, num_gpus: int, folder: Path, limit_s: float) -> Outcome:
    words = section.on_gpus if num_gpus else section.on_cpus
    own_folder = folder / section.name
    own_folder.mkdir(parents=True)
    values = {"folder": own_folder, "gpus": num_gpus, "seconds": int(0.95 * limit_s)}
    arguments = [word.format(**values) for word in words]
    command = f"python {' '.join(arguments)}"
    log = own_folder / "log"
    start_s = time.monotonic()
    exit_code: int | None = None
    state: State = "left out"
    if limit_s >= _LEAST_S:
        exit_code = _exit_code([sys.executable, *arguments], log, limit_s=limit_s)
        state = "passed" if exit_code == 0 else "failed"
        if exit_code is None:
            state = "out of time"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    figures = _last_object(lines)
    kept = [line[:400] for line in lines if not line.startswith("{")]
    return Outcome(
        name=section.name,
        title=section.title,
        says=section.says,
        state=state,
        command=command,
        exit_code=exit_code,
        seconds=round(time.monotonic() - start_s, 1),
        figures=figures,
        last_lines=kept[-NUM_LINES:],
    )


def _exit_code(command: Sequence[str], log: Path, *, limit_s: float) -> int | None:
    """Returns a program's exit code; None if it took too long, and was ended with all that it
    began."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_object(lines: Sequence[str]) -> dict[str, Any]:
    for line in reversed(lines):
        if line.startswith("{") and line.endswith("}"):
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return found
    return {}
