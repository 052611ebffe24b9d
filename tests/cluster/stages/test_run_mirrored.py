"""The process of a job: its stage's output kept in the run's storage, its exit code passed on, each
stage once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.cli import main
from cluster.output.job_log import LogReader, launches
from cluster.stages.run_mirrored import lease_key
from cluster.storage.lease import Lease, living_holder
from cluster.storage.uris import Storage, open_storage
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

STAGE = "tests.cluster.noisy_stage"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    (tmp_path / "run.yaml").write_text(f"run_id: demo\nstorage: {{uri: {tmp_path}/store}}\n")
    return open_storage(str(tmp_path / "store/runs/demo"))


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    (folder / "noisy.txt").write_text("\n".join(words))
    command = [
        sys.executable,
        "-m",
        "cluster.stages.run_mirrored",
        "--job",
        "demo.1",
        STAGE,
        str(folder / "run.yaml"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def newest(run: Storage) -> LogReader:
    return LogReader(run, launches(run)[-1])


def wait_for_line(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def test_output_result_and_exit_code_are_kept(run: Storage, tmp_path: Path) -> None:
    progress = 'raymill-progress: {"label": "training", "done": %d, "total": 9, "unit": "steps", "note": ""}'
    words = [
        "say hello",
        "complain oh",
        f"say {progress % 1}",
        f"say {progress % 2}",
        f"say {progress % 9}",
    ]
    process = start(tmp_path, *words, "say raymill-result: {cut", f"say {'z' * 70_000}", "result 7")
    out, err = process.communicate(timeout=limit_s(60))
    assert (process.returncode, err) == (0, "")
    assert out.startswith(f"hello\noh\n{progress % 1}\n{progress % 2}\n")  # all goes on as it was
    log = newest(run)
    lines = "".join(log.new_text()).splitlines()
    assert lines[:4] == ["hello", "oh", "training: 1 of 9 steps", "training: 9 of 9 steps"]
    assert lines[4] == "raymill-result: {cut"
    assert "".join(lines[5:]) == "z" * 70_000
    ended, started = log.ended(), log.started()
    assert ended is not None
    assert (ended.exit_code, ended.stopped, ended.result) == (0, False, {"value": "7"})
    assert (started.job, started.stage) == ("demo.1", "noisy_stage")
    assert living_holder(run, lease_key("noisy_stage"), timeout_s=1) is None


@pytest.mark.parametrize(("word", "code"), [("exit 2", 2), ("die", 128 + signal.SIGKILL)])
def test_a_stage_that_fails_or_is_killed_leaves_its_last_words(
    run: Storage, tmp_path: Path, word: str, code: int
) -> None:
    process = start(tmp_path, "result 1", "say last words", word)
    process.communicate(timeout=limit_s(60))
    ended = newest(run).ended()
    assert process.returncode == code
    assert ended is not None
    assert (ended.exit_code, ended.result) == (code, None)
    assert "".join(newest(run).new_text()) == "last words\n"


@pytest.mark.slow
def test_what_the_stage_leaves_behind_holds_nothing_up(run: Storage, tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(tmp_path, "leave-behind", "say done")
    assert process.wait(limit_s(25)) == 0
    assert time.monotonic() - began < limit_s(20)
    assert "".join(newest(run).new_text()) == "done\n"


def test_ray_tells_stage_and_mirror_to_stop_and_both_say_so(run: Storage, tmp_path: Path) -> None:
    process = start(tmp_path, "wait-for-sigterm", "exit 1")
    wait_for_line(process, "waiting")
    (stage,) = psutil.Process(process.pid).children()
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # the stage decides when it ends
    stage.terminate()
    assert process.wait(limit_s(20)) == 1
    ended = newest(run).ended()
    assert ended is not None and ended.stopped
    assert "".join(newest(run).new_text()) == "waiting\nasked to stop\n"


def test_a_stage_dies_with_its_mirror(run: Storage, tmp_path: Path) -> None:
    process = start(tmp_path, "say here", "wait-for-sigterm")
    wait_for_line(process, "here")
    wait_for_line(process, "waiting")
    (stage,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait(limit_s(10))
    psutil.wait_procs([stage], timeout=limit_s(20))
    assert not stage.is_running()


def test_a_run_has_each_stage_once(run: Storage, tmp_path: Path) -> None:
    with Lease(run, lease_key("noisy_stage")):
        second = start(tmp_path, "say twice")
        out, err = second.communicate(timeout=limit_s(60))
    assert (second.returncode, out) == (1, "")
    assert err.startswith("error: this run's noisy_stage runs already: ")
    assert launches(run) == []


def test_settings_without_a_run_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {source: x}\n")
    process = start(tmp_path, "say never")
    out, err = process.communicate(timeout=limit_s(60))
    assert (process.returncode, out) == (2, "")
    assert "names no run_id" in err


@pytest.mark.parametrize(("code", "launched"), [(2, 1), (3, 1), (1, 2), (137, 2)])
def test_a_job_that_ended_without_hope_is_not_launched_again(
    run: Storage, tmp_path: Path, code: int, launched: int
) -> None:
    """KubeRay starts a failed job again, on a new cluster, by the same command."""
    start(tmp_path, "say tried", f"exit {code}").communicate(timeout=limit_s(60))
    again = start(tmp_path, "say tried again", f"exit {code}")
    out, err = again.communicate(timeout=limit_s(60))
    assert again.returncode == code
    assert len(launches(run)) == launched
    if launched == 1:
        assert out == "" and "demo.1 has ended by an error that no other attempt mends" in err


def test_a_run_that_was_started_by_hand_is_stopped_through_its_storage(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(tmp_path, "wait-for-sigterm", "exit 1")
    wait_for_line(process, "waiting")
    assert main(["stop", "demo", "--storage.uri", f"{tmp_path}/store", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["state"], told["was_live"], told["backend"]) == ("stopped", True, "by hand")
    out, _ = process.communicate(timeout=limit_s(60))
    assert (process.returncode, out) == (1, "asked to stop\n")
    ended = newest(run).ended()
    assert ended is not None and ended.stopped
