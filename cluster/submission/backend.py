"""What every place that can run a job does with one: checks, takes, tells of and ends it."""

from abc import ABC, abstractmethod
from typing import Any

from cluster.settings.run import RunConfig
from cluster.submission.preflight import Folders
from cluster.submission.record import JobRecord, JobState


class JobBackend(ABC):
    """A place that runs jobs. None of its methods waits for a job."""

    @property
    @abstractmethod
    def folders(self) -> Folders: ...

    @abstractmethod
    def probe(self) -> None:
        """Raises `ClusterError` with what is wrong where it cannot be reached, or does not let us in."""

    @abstractmethod
    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        """Raises `AdmissionError` where the job would not find the room that it needs (`jobs.plan.memory`)."""

    @abstractmethod
    def record(self, config: RunConfig, stage: str, *, number: int, submitted: float) -> JobRecord:
        """How the run's submission of that number will be found again."""

    @abstractmethod
    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """Submits the job; the record with what is known only then. Raises `ClusterError`."""

    @abstractmethod
    def state(self, record: JobRecord) -> JobState | None:
        """None where it knows no such job (any more). Raises `ClusterError` where it cannot be asked."""

    @abstractmethod
    def stop(self, record: JobRecord) -> None:
        """Has the job save and end; returns at once. Nothing happens to one that has ended."""
