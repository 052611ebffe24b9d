"""Jobs of a Ray cluster, through its Jobs API."""

from typing import Any
from urllib.parse import urlsplit

from cluster.local.jobs_api import ClusterError, JobsApi
from cluster.settings.run import RunConfig
from cluster.stages.stage import Connection, submit_stage
from cluster.stages.stage_module import STAGES
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import Folders, check_cluster
from cluster.submission.record import Backend, JobRecord, JobState

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RayJobs(JobBackend):
    """Jobs named RUN.NUMBER, a name that the cluster takes only once."""

    def __init__(self, api: JobsApi) -> None:
        self._api = api
        self.kind, self.where = Backend.RAY, api.url
        self.folders = Folders.SAME if urlsplit(api.url).hostname in _LOOPBACK else Folders.UNKNOWN

    def probe(self) -> None:
        self._api.probe()

    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        check_cluster(self._api, config, stage, needs)

    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        try:
            submit_stage(Connection(self._api, None), STAGES[record.stage], config, job=record.job)
        except RuntimeError as error:
            raise ClusterError(
                f"{self._api.url} did not take the job: {str(error).splitlines()[0]}"
            ) from None
        return record

    def may_be_there(self, record: JobRecord) -> bool:
        return self._api.job(record.job) is not None

    def state(self, record: JobRecord) -> JobState | None:
        job = self._api.job(record.job)
        return JobState(job["status"].lower()) if job else None

    def stop(self, record: JobRecord) -> None:
        self._api.stop(record.job)
