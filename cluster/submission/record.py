"""The record of a run's submitted job: a small file in the run's storage by which later commands
find it."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from cluster.output.job_log import JOBS, STARTED, parsed
from cluster.storage.lease import read_with_version
from cluster.storage.uris import AlreadyExistsError, ConflictError, Storage, join_uri

_SUBMITTED = "submitted.json"
_KEY = f"{JOBS}/{_SUBMITTED}"


class JobState(StrEnum):
    """The state of a job, as far as it is known."""

    PENDING = "pending"  # accepted; waits for a cluster, a queue or room
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # its log says why
    STOPPED = "stopped"  # on request; submitting the run again resumes it
    # Its cluster is gone without a word on how it ended; submitting the run again resumes it
    LOST = "lost"

    @property
    def is_live(self) -> bool:
        return self in (JobState.PENDING, JobState.RUNNING)

    @property
    def is_bad(self) -> bool:
        return self in (JobState.FAILED, JobState.STOPPED, JobState.LOST)


class Backend(StrEnum):
    """The kind of place that runs a job."""

    LOCAL = "local"  # a cluster on the submitter's machine that lasts as long as the job
    RAY = "ray"  # a Ray cluster with a Jobs API
    KUBERAY = "kuberay"  # a RayJob on Kubernetes
    HAND = "by hand"  # none: another command than `raymill submit` started it


@dataclass(frozen=True)
class JobRecord:
    """`number` counts the submissions of the run."""

    run_id: str
    stage: str
    backend: Backend
    where: str  # host name; address of the Jobs API; Kubernetes namespace
    job: str  # the name that the backend knows it by
    number: int
    submitted: float  # Unix time, s
    stopped: bool = False  # it was asked to end
    refused: str = ""  # why the backend did not take it
    pid: int = 0  # of a local job's owner
    started_s: float = 0.0  # of that process, after the machine's boot
    machine: str = ""  # on which that pid means something


def read_record(run: Storage) -> tuple[JobRecord, str] | None:
    """Returns the run's last submission and the version of its file; None if there is none. Raises
    `StorageError`."""
    content, version = read_with_version(run, _KEY)
    if version is None:
        return None
    uri = join_uri(run.uri, _KEY)
    return parsed(
        lambda backend, **rest: JobRecord(backend=Backend(backend), **rest), content, uri
    ), version


def write_record(run: Storage, record: JobRecord, *, replaces: str | None) -> str | None:
    """Replaces the version `replaces`, or stores the first record. Returns its version, None if
    another was faster."""
    content = json.dumps(asdict(record)).encode()
    try:
        return run.write_bytes(_KEY, content, if_absent=replaces is None, if_version=replaces)
    except (AlreadyExistsError, ConflictError):
        return None


def recorded_runs(runs: Storage) -> list[str]:
    """Returns the ids of runs below `runs` that were submitted or had a stage started by hand."""
    keys = [entry.key.split("/") for entry in runs.list()]
    return sorted(
        {run for run, *rest in keys if rest[:1] == [JOBS] and rest[-1] in (_SUBMITTED, STARTED)}
    )
