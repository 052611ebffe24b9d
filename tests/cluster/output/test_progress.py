"""A watcher sees a stage's own lines and now and then a report; Ray's lines go to the file."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.output import progress
from cluster.output.progress import ProgressView, report_progress, say_from_worker

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


def test_what_a_worker_has_to_tell_is_shown_without_rays_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    say_from_worker("ledger: the storage is down")
    told = f"(RayTrainWorker pid=12, ip=127.0.0.1) {capfd.readouterr().err.rstrip()}"
    assert view_lines(tmp_path, [*RAY_BLOCK, told, "    more of Ray's"]).count(told) == 1
    assert capfd.readouterr().err.splitlines() == ["ledger: the storage is down"]


def test_a_log_on_a_full_disk_is_given_up_with_one_line_and_ends_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with ProgressView(Path("/dev/full")) as view:
        for line in OWN_LINES:
            view.line(line)
    first, *others = capfd.readouterr().err.splitlines()
    assert "this log is not kept from here on: /dev/full: No space left on device" in first
    assert others == OWN_LINES


def test_a_log_that_cannot_be_begun_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with ProgressView(tmp_path / "file" / "job.log") as view:
        view.line(OWN_LINES[0])
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_command_whose_terminal_takes_nothing_any_more_goes_on() -> None:
    code = "from cluster.output.progress import say; [say('x') for _ in range(3)]; print('done')"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], stderr=full, stdout=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stdout) == (0, b"done\n")


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


_AT_A_TERMINAL = """
from cluster.output import progress
from cluster.output.progress import report_progress, reports_shown
with reports_shown():
    notes = "440 documents, 2,904,245 tokens, 11.0 MB/s, workers up to 243 MiB, 0 tasks queued"
    report_progress("indexing documents", done=8, total=8, unit="MB", note=notes)
    report_progress("tokenizing", done=8, total=8, unit="MB", note=notes)
    progress._views[0].line("attempt 1: 1 worker, from step 0")
    report_progress("training", done=34, total=48, unit="steps", note="loss 5.909, 1 worker")
"""


@pytest.mark.parametrize("width", [60, 100, 140])
def test_a_terminal_shows_whole_words_in_the_order_of_events(width: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-c", _AT_A_TERMINAL]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # of a terminal that nobody holds open any more
            while piece := os.read(ours, 1 << 16):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "…" not in text, text
    places = [text.rindex(word) for word in ("tokenizing", "attempt 1", "training")]
    assert places == sorted(places)


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
