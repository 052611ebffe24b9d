"""Jobs as RayJobs on Kubernetes: each brings its own Ray cluster and takes it away."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.kube.kustomize import rendered_overlay
from cluster.kube.status import Object
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import Folders
from cluster.submission.rayjob import rayjob, rayjob_name
from cluster.submission.record import Backend, JobRecord, JobState

if TYPE_CHECKING:
    from cluster.kube.client import KubeApi

_RAY = "ray.io/v1"
_ENDED = {
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "STOPPED": JobState.STOPPED,
    "Failed": JobState.FAILED,
    "ValidationFailed": JobState.FAILED,
}
"""By Ray's word for the job, or else KubeRay's."""


@dataclass(frozen=True)
class Overlay:
    """A kustomization, and the namespace that it is rendered into; its own when that is None."""

    folder: Path
    namespace: str | None = None


class KubeJobs(JobBackend):
    """`overlay` is needed to submit only."""

    def __init__(self, api: "KubeApi", overlay: Overlay | None = None) -> None:
        self._api, self._overlay = api, overlay
        self._needs: dict[str, Any] = {}

    @property
    def folders(self) -> Folders:
        return Folders.NONE

    def probe(self) -> None:
        self._api.all(_RAY, "RayJob")

    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        self._needs = needs
        job, _ = self.objects(config, stage, number=1)
        if (namespace := job["metadata"]["namespace"]) != self._api.namespace:
            raise ConfigError(f"the overlay's namespace is {namespace}, not {self._api.namespace}: give -n {namespace}")

    def objects(self, config: RunConfig, stage: str, *, number: int) -> list[Object]:
        """What `start` applies; `check` comes first."""
        assert self._overlay is not None, "submitting takes an overlay"
        name = rayjob_name(str(config.run_id), number)
        rendered = rendered_overlay(self._overlay.folder, self._overlay.namespace)
        return rayjob(rendered, config, stage, name=name, needs=self._needs)

    def record(self, config: RunConfig, stage: str, *, number: int, submitted: float) -> JobRecord:
        run_id = str(config.run_id)
        name = rayjob_name(run_id, number)
        return JobRecord(run_id, stage, Backend.KUBERAY, self._api.namespace, name, number, submitted)

    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """The job first: it owns its settings, so that Kubernetes removes them with it, and its pods wait for them."""
        job, settings = self.objects(config, record.stage, number=record.number)
        made = self._api.apply(job)
        owner = {"apiVersion": _RAY, "kind": "RayJob", "name": record.job, "uid": made["metadata"]["uid"]}
        settings["metadata"]["ownerReferences"] = [owner]
        self._api.apply(settings)
        return record

    def state(self, record: JobRecord) -> JobState | None:
        job = self._api.get(_RAY, "RayJob", record.job)
        if job is None:
            return None
        status = job.get("status") or {}
        deployment = status.get("jobDeploymentStatus", "")
        if deployment in ("Complete", "Failed", "ValidationFailed"):
            return _ENDED.get(status.get("jobStatus", "")) or _ENDED.get(deployment, JobState.FAILED)
        is_running = deployment == "Running" and status.get("jobStatus") == "RUNNING"
        return JobState.RUNNING if is_running else JobState.PENDING

    def stop(self, record: JobRecord) -> None:
        """Its pods are drained, so the run saves; the object goes, so that nobody resumes it beside a later one."""
        self._api.delete(_RAY, "RayJob", record.job)
