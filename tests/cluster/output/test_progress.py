"""A watcher sees a stage's own lines and now and then a report; Ray's lines go to the file."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.output import progress
from cluster.output.progress import ProgressView, report_progress

RAY_BLOCK = [
    "2026-01-02 03:04:05,678\tINFO worker.py:1879 -- Connecting to existing Ray cluster at address: 127.0.0.1:1",
    "(RayTrainWorker pid=12, ip=127.0.0.1) Setting up process group for: env:// [rank=0, world_size=2]",
    "(raylet) bash: warning: setlocale",
    "(autoscaler +5s) Tip: use `ray status`",
    "[2026-01-02 03:04:05,678 E 12345 12399] core_worker.cc:2157: Actor with class name: 'X' cannot be created",
    "Running entrypoint for job raysubmit_1: exec python -m jobs.pretrain run.yaml",
    "*** SIGTERM received at time=1795955368 on cpu 0 ***",
    "PC: @     0x7fba53ca676e  (unknown)  (unknown)",
    "    @     0x7fba53c4bd70  (unknown)  (unknown)",
    "[2026-01-02 03:04:05,678 E 27265 27265] logging.cc:474: PC: @     0x7fba53ca676e  (unknown)  (unknown)",
    "(TrainController pid=11) Traceback (most recent call last):",
    '  File "x.py", line 1, in train',
    "",
    "\traise",
]
OWN_LINES = [
    "run r: 8 steps",
    "attempt 1: 2 workers, from step 0",
    "(an aside of the stage's own)",
    "2026 was a year",
]


def view_lines(tmp_path: Path, lines: list[str]) -> str:
    """Shows the lines; returns what the file holds."""
    with ProgressView(tmp_path / "logs" / "job.log") as view:
        for line in lines:
            view.line(line)
    return view.log.read_text(encoding="utf-8")


def report(label: str, done: float, capfd: pytest.CaptureFixture[str]) -> str:
    """The marked line as a stage writes it."""
    report_progress(label, done=done, total=10, unit="steps", note="loss 3")
    return capfd.readouterr().err.removesuffix("\n")


def test_rays_lines_go_to_the_file_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [OWN_LINES[0], *RAY_BLOCK, *OWN_LINES[1:]]
    kept = view_lines(tmp_path, lines)
    assert capfd.readouterr().err.splitlines() == OWN_LINES
    assert kept.splitlines() == lines


def test_the_stack_of_a_crash_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    crash = [
        "*** SIGSEGV received at time=1795955368 on cpu 0 ***",
        "PC: @ 0x7fba  (unknown)",
        "    @ 0x7fbb  f()",
    ]
    view_lines(tmp_path, [OWN_LINES[0], *crash])
    assert capfd.readouterr().err.splitlines() == [OWN_LINES[0], *crash]


def test_a_workers_error_is_shown_though_ray_says_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = "(RayTrainWorker pid=12, ip=127.0.0.1) FloatingPointError: step 3 has loss nan"
    view_lines(tmp_path, [*RAY_BLOCK, error, "    more of Ray's"])
    assert capfd.readouterr().err.splitlines() == [error]


def test_reports_are_rare_when_piped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten reports a second for a while: one line per interval and label, and always the last
    one."""
    clock = iter(number / 10 for number in range(1000))
    reports = [report("training", step / 30, capfd) for step in range(300)]
    other, last = report("tokenizing", 1, capfd), report("training", 10, capfd)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    kept = view_lines(tmp_path, [*reports, other, last])
    shown = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["training"] * 3 + ["tokenizing", "training"]
    assert shown[0] == "training: 0 of 10 steps, loss 3"
    assert shown[-2:] == ["tokenizing: 1 of 10 steps, loss 3", "training: 10 of 10 steps, loss 3"]
    assert kept == ""  # reports are no log


def test_bytes_are_reported_to_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress("tokenizing", total=3_000_000 / 1e6) as advance:
        for _ in range(3):
            advance(1_000_000 / 1e6)
    lines = [json.loads(line.partition(": ")[2]) for line in capfd.readouterr().err.splitlines()]
    assert (lines[-1]["done"], lines[-1]["total"], lines[-1]["unit"]) == (3.0, 3.0, "MB")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(text=st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"])))
def test_no_text_breaks_the_view(tmp_path: Path, text: str) -> None:
    assert view_lines(tmp_path, [text]).endswith(f"{text}\n")
