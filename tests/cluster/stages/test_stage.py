"""A person who starts a stage reads its progress, and one line of error with the place of the whole
log."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import pytest
from ray.job_submission import JobStatus

from cluster.cli import main
from cluster.local.jobs_api import JobsApi
from cluster.output.progress import ProgressView, report_progress, reports_shown
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.settings.serve import ServeConfig
from cluster.stages import stage
from cluster.stages.stage import Connection, _follow, run_stage, stage_main
from cluster.stages.stage_module import StageFailedError


def test_a_process_shows_its_own_reports_as_progress_where_it_is_asked_to(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with reports_shown():
        report_progress("verifying", done=3, total=3, unit="MB")
    report_progress("verifying", done=3, total=3, unit="MB")
    shown, line = capfd.readouterr().err.splitlines()
    assert shown == "verifying: 3 of 3 MB"
    assert line.startswith("raymill-progress: ")


@dataclass
class EndedJob:
    """The part of Ray's client that follows a job, with the log of one that has ended."""

    log: str
    status: JobStatus = JobStatus.FAILED
    driver_exit_code: int = 1

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield self.log[:7]
        yield self.log[7:]

    def get_job_status(self, job_id: str) -> JobStatus:
        return self.status

    def stop_job(self, job_id: str) -> None:
        self.status = JobStatus.STOPPED

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def get_job_info(self, job_id: str) -> "EndedJob":
        return self


@pytest.mark.parametrize(
    ("log", "code", "kind", "words"),
    [
        (
            "listing\nerror: the corpus is empty\n",
            1,
            StageFailedError,
            "the corpus is empty (the whole log is in ",
        ),
        ("error: no such setting\n", 2, ConfigError, "no such setting (the whole log is in "),
        (
            "listing\n",
            137,
            StageFailedError,
            "job j ended with exit code 137 (the whole log is in ",
        ),
    ],
)
def test_a_failed_job_is_one_line_of_error(
    tmp_path: Path,
    log: str,
    code: int,
    kind: type[Exception],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "job.log"
    with pytest.raises(kind) as failed, ProgressView(path, waiting="starting the job") as view:
        asyncio.run(_follow(EndedJob(log, driver_exit_code=code), "j", view))  # type: ignore[arg-type]
    assert str(failed.value) == f"{words}{path})"
    assert capfd.readouterr().err.splitlines() == [
        "starting the job",
        *(["listing"] if "listing" in log else []),
    ]
    assert path.read_text() == log


def test_an_interrupt_has_the_job_save_and_says_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*asked: object) -> None:
        raise KeyboardInterrupt

    job = EndedJob(
        "attempt 1\nerror: run r is saved at step 41 of 60 and has ended, as asked\n",
        JobStatus.RUNNING,
    )
    monkeypatch.setattr(stage, "_jobs_client", lambda connection: job)
    monkeypatch.setattr(stage, "submit_stage", lambda *asked, **settings: "j")
    monkeypatch.setattr(stage, "_follow", interrupted)
    storage = {"uri": str(tmp_path)}
    config = RunConfig.model_validate({"run_id": "r", "storage": storage})
    connection = Connection(JobsApi("http://127.0.0.1:9", None), None)
    with pytest.raises(KeyboardInterrupt):
        run_stage(connection, "jobs.pretrain", config)
    assert job.status == JobStatus.STOPPED
    assert capfd.readouterr().err.splitlines() == [
        "starting the job",
        "stopping: the job saves and ends",
        "run r is saved at step 41 of 60 and has ended, as asked",
    ]
    job.status = JobStatus.RUNNING
    with pytest.raises(KeyboardInterrupt):
        run_stage(connection, "serving.app", ServeConfig.model_validate({"storage": storage}))
    assert capfd.readouterr().err.splitlines()[1] == "stopping: the job ends", (
        "an endpoint has nothing to save"
    )


@pytest.mark.parametrize(
    ("words", "in_job"), [(["run.yaml"], False), ([], True), (["run.yaml", "--run-id", "r"], True)]
)
def test_a_stage_that_is_no_job_names_the_command_that_submits_it(
    words: list[str],
    in_job: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(config: RunConfig) -> Never:
        raise AssertionError("it must not run")

    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", *words])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if in_job:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert stage_main(refuse, RunConfig) == 2
    assert "`raymill` submits it" in capsys.readouterr().err


def test_a_second_interrupt_says_what_went_unsaved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [{"step": number} for number in range(1, 26)]
    lines.insert(3, {"event": "checkpoint", "step": 2})

    @contextmanager
    def interrupted(*asked: object, **settings: object) -> Iterator[None]:
        ledger = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / ".raymill/runs/mine/ledger.jsonl").write_text(ledger)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(stage, "connected", interrupted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be")
    assert main(["pretrain", "--data.source", "text.txt", "--run-id", "mine"]) == 130
    _, unsaved, then, _ = capsys.readouterr().err.splitlines()
    assert unsaved.startswith("not saved: the last 23 steps; the run goes on after step 2")
    assert then.startswith("continue with: raymill pretrain")


@pytest.mark.parametrize("known", [[], ["--run-id", "mine"]])
def test_an_interrupted_command_says_how_to_continue(
    tmp_path: Path,
    known: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def interrupted(*asked: object, **settings: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(stage, "connected", interrupted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a text.txt").write_text("to be")
    assert main(["pretrain", "--data.source", "a text.txt", *known]) == 130
    first, then, last = capsys.readouterr().err.splitlines()
    run_id = first.split()[2].rstrip(",")
    assert then == f"continue with: raymill pretrain --data.source 'a text.txt' --run-id {run_id}"
    assert last == "interrupted"
