"""The interface of a job backend: check, submit, report, stop."""

import time
from abc import ABC, abstractmethod
from typing import Any

from cluster.settings.run import RunConfig
from cluster.submission.preflight import Folders
from cluster.submission.record import Backend, JobRecord, JobState


class JobBackend(ABC):
    """A place that runs jobs. None of its methods waits for a job."""

    kind: Backend
    where: str
    folders: Folders
    starts_in_parts = False  # `complete` ends a `start` that was interrupted

    def probe(self) -> None:  # noqa: B027 (this machine needs none)
        """Raises `ClusterError` if the place cannot be reached or refuses us."""

    @abstractmethod
    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        """Raises `AdmissionError` if the job would not find the room that it needs
        (`jobs.plan.memory`)."""

    def name(self, run_id: str, number: int) -> str:
        return f"{run_id}.{number}"

    def record(self, config: RunConfig, stage: str, *, number: int) -> JobRecord:
        """Returns the record by which the run's submission of that number will be found."""
        run_id = str(config.run_id)
        return JobRecord(
            run_id, stage, self.kind, self.where, self.name(run_id, number), number, time.time()
        )

    @abstractmethod
    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """Submits the job and returns the completed record. Raises `ClusterError`, and leaves no
        part of the job if the place still answers."""

    def manifests(self, config: RunConfig, stage: str) -> list[dict[str, Any]] | None:
        """Returns what `start` would apply to Kubernetes, None of a place that is none; `check` comes
        first."""
        return None

    def complete(self, config: RunConfig, record: JobRecord) -> None:  # noqa: B027 (most start a job by one request)
        """Does what an interrupted `start` of this job has left undone, and nothing if that is
        nothing."""

    def may_be_there(self, record: JobRecord) -> bool:
        """Says whether the place has the job although `start` failed. Raises `ClusterError` if it
        does not answer."""
        return False

    def strays(self, record: JobRecord) -> list[str]:
        """Returns the names of jobs of the run that have not ended and are not the record's."""
        return []

    @abstractmethod
    def state(self, record: JobRecord) -> JobState | None:
        """Returns the job's state, or None if it is unknown. Raises `ClusterError` if the place
        does not answer."""

    @abstractmethod
    def stop(self, record: JobRecord) -> None:
        """Asks the job, and any stray of its run, to save and end, without waiting; what has ended
        is left alone."""
