"""What whoever starts a stage reads: its progress as progress, and one line of error with the place of the whole log."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from cluster.parser import ConfigError
from cluster.progress import ProgressView, report_progress, reports_shown
from cluster.stage import _follow
from cluster.stage_module import StageFailedError


def test_a_process_shows_its_own_reports_as_progress_where_it_is_asked_to(capfd: pytest.CaptureFixture[str]) -> None:
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
