"""Jobs as RayJobs on Kubernetes, each with a Ray cluster of its own."""

from pathlib import Path
from typing import Any

from cluster.kube.kustomize import rendered_overlay
from cluster.kube.status import RAY, Object, has_ended
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import Folders
from cluster.submission.rayjob import rayjob, rayjob_name
from cluster.submission.record import Backend, JobRecord, JobState


class KubeJobs(JobBackend):
    """RayJobs of one namespace; only submitting needs the `overlay`, which is rendered into `namespace`, or if that is
    None into its own, which has to be `raymill`. Raises `UserError` without Kubernetes' client."""

    def __init__(self, namespace: str | None, overlay: Path | None = None) -> None:
        from cluster.kube.client import KubeApi  # noqa: PLC0415 (its client is an extra)

        self._api, self._overlay, self._namespace = KubeApi(namespace), overlay, namespace
        self.kind, self.where, self.folders = Backend.KUBERAY, self._api.namespace, Folders.NONE
        self._needs: dict[str, Any] = {}

    def probe(self) -> None:
        self._api.all(RAY, "RayJob")

    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        self._needs = needs
        job, _ = self.objects(config, stage, number=1)
        if (namespace := job["metadata"]["namespace"]) != self._api.namespace:
            raise ConfigError(f"the overlay's namespace is {namespace}, not {self._api.namespace}: give -n {namespace}")

    def objects(self, config: RunConfig, stage: str, *, number: int) -> list[Object]:
        """Returns what `start` applies; `check` comes first."""
        assert self._overlay is not None, "submitting takes an overlay"
        name = self.name(str(config.run_id), number)
        return rayjob(rendered_overlay(self._overlay, self._namespace), config, stage, name=name, needs=self._needs)

    def name(self, run_id: str, number: int) -> str:
        return rayjob_name(run_id, number)

    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """Applies the job first: it owns its settings, so Kubernetes removes them with it; its pods wait for them."""
        job, settings = self.objects(config, record.stage, number=record.number)
        made = self._api.apply(job)
        owner = {"apiVersion": RAY, "kind": "RayJob", "name": record.job, "uid": made["metadata"]["uid"]}
        settings["metadata"]["ownerReferences"] = [owner]
        self._api.apply(settings)
        return record

    def state(self, record: JobRecord) -> JobState | None:
        job = self._api.get(RAY, "RayJob", record.job)
        if job is None:
            return None
        status = job.get("status") or {}
        ray_status = status.get("jobStatus", "")
        if has_ended(job):
            return JobState(ray_status.lower()) if ray_status in ("SUCCEEDED", "STOPPED") else JobState.FAILED
        is_running = status.get("jobDeploymentStatus") == "Running" and ray_status == "RUNNING"
        return JobState.RUNNING if is_running else JobState.PENDING

    def stop(self, record: JobRecord) -> None:
        """Deletes the object: its pods are drained, so the run saves, and it cannot be resumed beside a later job."""
        self._api.delete(RAY, "RayJob", record.job)
