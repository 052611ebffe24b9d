"""What whoever starts a stage reads: its progress as progress, and one line of error with the place of the whole log."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from cluster.module_process import run_module
from cluster.parser import ConfigError
from cluster.progress import ProgressView
from cluster.stage import _follow
from cluster.stage_module import ModuleFailedError, StageFailedError

MODULE = "tests.cluster.noisy_stage"
REPORT = {"label": "verifying", "done": 3, "total": 3, "unit": "MB", "note": ""}


def run_noisy(folder: Path, *words: str) -> dict[str, str]:
    (folder / "noisy.txt").write_text("\n".join(words))
    return run_module(MODULE, str(folder / "run.yaml"))


def test_a_modules_reports_are_shown_as_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = f"complain raymill-progress: {json.dumps(REPORT)}"
    assert run_noisy(tmp_path, "complain two shards", report, "result fine") == {"value": "fine"}
    assert capfd.readouterr().err.splitlines() == ["two shards", "verifying: 3 of 3 MB"]


def test_a_module_that_fails_says_why_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModuleFailedError):
        run_noisy(tmp_path, "complain error: no such run", "exit 1")
    assert capfd.readouterr().err == "error: no such run\n"


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

    def get_job_info(self, job_id: str) -> "EndedJob":
        return self


@pytest.mark.parametrize(
    ("log", "code", "kind", "words"),
    [
        ("listing\nerror: the corpus is empty\n", 1, StageFailedError, "the corpus is empty (the whole log is in "),
        ("error: no such setting\n", 2, ConfigError, "no such setting (the whole log is in "),
        ("listing\n", 137, StageFailedError, "job j ended with exit code 137 (the whole log is in "),
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
        _follow(EndedJob(log, driver_exit_code=code), "j", view)  # type: ignore[arg-type]
    assert str(failed.value) == f"{words}{path})"
    assert capfd.readouterr().err.splitlines() == ["starting the job", *(["listing"] if "listing" in log else [])]
    assert path.read_text() == log
