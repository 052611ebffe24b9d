"""A closed terminal ends a command as SIGTERM does: what it has begun is ended, and nothing fails for
want of a place to write to."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.command_line import RAYMILL, environment, raymill
from tests.jobs.corpora import number_texts
from tests.time_limits import limit_s
from tests.waiting import wait_until

# A command that trains, without a cluster: what it begins is a file that it takes away.
_STANDS_IN = """
import contextlib, signal, sys, threading
from pathlib import Path
from cluster.cli import main
from cluster.stages import stage

@contextlib.contextmanager
def connected(*asked, **settings):
    Path("begun").touch()
    try:
        threading.Event().wait()
        yield
    finally:
        for _ in range(1000):
            print("a line for the terminal", file=sys.stderr)
        Path("begun").rename("ended")

stage.connected = connected
sys.exit(main(["pretrain", "--data.source", "text.txt", "--run-id", "r"]))
"""


@contextmanager
def at_a_terminal(
    command: Sequence[str], folder: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Gives the terminal's other end, whose close is the close of its window, and the command."""
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    shell = [sys.executable, "-c", _LEADER, *command]
    process = subprocess.Popen(
        shell, cwd=folder, env=environment(), start_new_session=True, **streams
    )
    os.close(theirs)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait()


# As a login does, it makes the terminal that of its session, and is then the command.
_LEADER = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which these tests may have been started without
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_a_command_ends_what_it_began_when_its_terminal_is_closed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be")
    with at_a_terminal([sys.executable, "-c", _STANDS_IN], tmp_path) as (terminal, command):
        wait_until(lambda: (tmp_path / "begun").exists() or command.poll() is not None)
        os.close(terminal)
        assert command.wait(limit_s(30)) == 128 + signal.SIGHUP
    assert (tmp_path / "ended").exists()


def test_nohup_keeps_a_command_alive(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be")
    nohup = ["nohup", sys.executable, "-c", _STANDS_IN]
    with at_a_terminal(nohup, tmp_path) as (terminal, command):
        wait_until(lambda: (tmp_path / "begun").exists() or command.poll() is not None)
        os.close(terminal)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(2)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_is_saved_when_its_terminal_is_closed_and_status_says_how_it_continues(
    tmp_path: Path,
) -> None:
    number_texts(tmp_path / "corpus")
    words = ["pretrain", "--data.source", "corpus", "--data.vocab-size", "300", "--run-id", "r"]
    words += ["--model.preset", "tiny", "--train.seq-len", "32", "--train.max-tokens", "2M"]
    words += ["--scaling.max-workers", "1"]
    ledger = tmp_path / ".raymill/runs/r/ledger.jsonl"

    def trains() -> bool:
        return ledger.exists() and ledger.read_bytes().count(b'"loss"') > 9

    with at_a_terminal([*RAYMILL, *words], tmp_path) as (terminal, command):
        os.set_blocking(terminal, False)

        def has_trained_or_ended() -> bool:
            _read_away(terminal)
            return trains() or command.poll() is not None

        wait_until(has_trained_or_ended, timeout_s=180)
        assert command.poll() is None
        os.close(terminal)
        assert command.wait(limit_s(60)) == 128 + signal.SIGHUP
    assert any((tmp_path / ".raymill/runs/r/checkpoints").iterdir())
    status = raymill("status", "r", folder=tmp_path)
    shown = [" ".join(line.split()) for line in status.stdout.splitlines()]
    assert "state stopped" in shown, status.stdout
    assert f"continue with raymill {' '.join(words)}" in shown
    lines = map(json.loads, ledger.read_text().splitlines())
    (stopped,) = [line for line in lines if line.get("event") == "preempted"]
    assert stopped["continue_with"] == f"raymill {' '.join(words)}"


def _read_away(terminal: int) -> None:
    """Takes what waits in the terminal: a command waits for a reader of what it writes."""
    with suppress(BlockingIOError):
        os.read(terminal, 1 << 16)
