"""The watchdog: its verdicts in a table, and real processes that stop, stand still, or are merely
slow."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch.distributed import distributed_c10d

from cluster.storage import s3 as s3_storage
from jobs.exact import batch_gradient
from jobs.run import storage_retry as outage
from jobs.saving import saving_thread
from jobs.tokens import token_stream
from jobs.training.train_worker import WAITING_PLACES
from jobs.workers import heartbeat
from jobs.workers.heartbeat import Pulse
from jobs.workers.incident_notes import INCIDENTS
from jobs.workers.watchdog import HANGS, Beat, Health, Place, Waits, health
from model.operations import compilations
from raymill import side_thread as background
from raymill.state import peers
from raymill.workers import worker_group
from tests.time_limits import limit_s
from tests.waiting import wait_until

COLLECTIVE = [Waits.WORKERS]
READING = [Waits.STORAGE]


@pytest.mark.parametrize(
    ("place", "usual_step_s", "waits_for", "silent_s", "unmoved_s", "expected"),
    [
        (Place.STEP, 0.1, [], 1, 20, Health.WELL),
        (Place.STEP, 0.1, [], 30, 30, Health.SILENT),
        (Place.STEP, 0.1, [], 1, 36, Health.WELL),
        (Place.STEP, 0.1, [], 1, 38, Health.STUCK),
        (Place.STEP, 10.0, [], 1, 150, Health.WELL),  # long steps have a long deadline
        (Place.STEP, 10.0, [], 1, 201, Health.STUCK),
        (Place.STEP, 0.1, COLLECTIVE, 1, 100, Health.WELL),  # a victim is not blamed
        (Place.STEP, 0.1, COLLECTIVE, 1, 751, Health.FORSAKEN),
        # An outage of the storage ends no training
        (Place.STEP, 0.1, READING, 1, 3600, Health.WELL),
        (Place.AROUND, None, [], 1, 3600, Health.WELL),
        (Place.AROUND, None, [], 31, 31, Health.SILENT),
        (Place.FIRST_STEP, None, [], 1, 200, Health.WELL),
        (Place.VALIDATION, 0.1, [], 1, 301, Health.STUCK),
        # A model with long steps has long validations and saves
        (Place.VALIDATION, 60.0, [], 1, 1199, Health.WELL),
        (Place.VALIDATION, 60.0, [], 1, 1201, Health.STUCK),
        (Place.SAVE, 60.0, [], 1, 1199, Health.WELL),
    ],
)
def test_who_hangs(
    place: Place,
    usual_step_s: float | None,
    waits_for: list[Waits],
    silent_s: float,
    unmoved_s: float,
    expected: Health,
) -> None:
    beat = Beat(place, 1, usual_step_s, waits_for, [])
    assert Beat.from_json(asdict(beat)) == beat
    assert health(beat, silent_s=silent_s, unmoved_s=unmoved_s, hang_timeout_s=30) is expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (distributed_c10d, [Waits.WORKERS]),
        (worker_group, []),  # a worker that stands there and is in no message holds the others up
        (peers, []),
        (background, []),
        (token_stream, [Waits.STORAGE]),
        (outage, [Waits.STORAGE]),
        (saving_thread, [Waits.STORAGE]),
        (s3_storage, [Waits.STORAGE]),
        (batch_gradient, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_modules_in_a_stack_show_what_a_worker_waits_for(
    module: ModuleType, expected: list[Waits]
) -> None:
    """The real modules count, wherever they lie: renaming one gets no healthy worker killed."""
    code = compile("def look(beat):\n    return beat()\n", str(module.__file__), "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    beat = names["look"](Pulse(WAITING_PLACES).beat)
    assert beat.waits_for == expected
    assert Beat.from_json(json.loads(json.dumps(asdict(beat)))) == beat


def test_a_worker_waits_for_others_while_it_is_in_a_message_wherever_its_training_thread_is() -> (
    None
):
    """On a GPU a message holds up whatever the host asks of the device next."""
    pulse = Pulse({})
    before = pulse.beat()
    assert before.waits_for == []
    with pulse.meeting.progress.message(range(2)):
        assert pulse.beat().waits_for == [Waits.WORKERS]
    after = pulse.beat()
    assert after.waits_for == []
    assert after.num_moves > before.num_moves, "each message is a move"


def test_a_step_that_compiles__is_like_a_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take minutes, and does not count as one of the usual steps."""
    now_s = 0.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now_s))
    pulse = Pulse({})
    for _ in range(3):
        pulse.at(Place.STEP)
        now_s += 1.0
    assert (pulse.beat().place, pulse.beat().usual_step_s) == (Place.STEP, 1.0)
    monkeypatch.setattr(compilations, "number", compilations.number + 1)
    compiling = pulse.beat()
    assert compiling.place is Place.FIRST_STEP
    assert health(compiling, silent_s=1, unmoved_s=200, hang_timeout_s=30) is Health.WELL
    now_s += 200.0
    pulse.at(Place.STEP)
    assert pulse.beat().place is Place.STEP
    now_s += 3.0
    pulse.at(Place.STEP)
    assert pulse.beat().usual_step_s == 1.0, "the median of 1, 1 and 3"


WORKER = """
import os, select, signal, sys, time
from jobs.workers.heartbeat import watched
from jobs.workers.watchdog import Place

def stand_still():
    time.sleep(600)

with watched(sys.argv[1], rank=3, hang_timeout_s=float(sys.argv[3]), waiting_places={}) as pulse:
    for _ in range(5):
        pulse.at(Place.STEP)
        time.sleep(0.1)
    print("ready", flush=True)
    if sys.argv[2] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if sys.argv[2] == "stand":
        stand_still()
    while not select.select([sys.stdin], [], [], 0)[0]:
        pulse.at(Place.STEP)
        time.sleep(0.1)
"""
HANG_TIMEOUT_S = limit_s(0.5)


def start(run_uri: Path, how: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run_uri), how, str(HANG_TIMEOUT_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    return worker


def stacks(run_uri: Path) -> str:
    wait_until(lambda: list((run_uri / INCIDENTS).glob("*.json")))  # noted after the kill
    return "".join(path.read_text() for path in sorted((run_uri / HANGS).iterdir()))


@pytest.mark.parametrize(("how", "verdict"), [("stop", "silent"), ("stand", "stuck")])
def test_a_hanging_worker_is_killed_and_its_stack_kept(
    tmp_path: Path, how: str, verdict: str
) -> None:
    began = time.monotonic()
    worker = start(tmp_path, how)
    assert worker.wait(limit_s(20)) == -signal.SIGKILL
    assert time.monotonic() - began < limit_s(10)
    text = stacks(tmp_path)
    assert f"rank 3, process {worker.pid}: {verdict}" in text
    if how == "stop":
        assert ": T\n" in text  # the kernel's word for it
    else:
        assert "in stand_still" in text
    note = next((tmp_path / INCIDENTS).iterdir()).read_text()
    assert '"event": "hang"' in note
    assert '"rank": 3' in note


def test_a_straggler_is_spared(tmp_path: Path) -> None:
    """Stopped for nine tenths of its time, longer than the timeout in all."""
    worker = start(tmp_path, "slow")
    for _ in range(math.ceil(2 * HANG_TIMEOUT_S / 0.9)):
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(0.9)
        os.kill(worker.pid, signal.SIGCONT)
        time.sleep(0.1)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(limit_s(20)) == 0
    assert not (tmp_path / INCIDENTS).exists()
