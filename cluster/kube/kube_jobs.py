"""Jobs as RayJobs on Kubernetes, each with a Ray cluster of its own."""

from contextlib import suppress
from typing import Any

from cluster.kube.kustomize import overlay_folder, rendered_overlay
from cluster.kube.rayjob import rayjob, rayjob_name
from cluster.kube.status import RAY, Object, has_ended, run_of
from cluster.local.jobs_api import ClusterError
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import Folders
from cluster.submission.record import Backend, JobRecord, JobState


class KubeJobs(JobBackend):
    """RayJobs of one namespace; only submitting needs the `overlay`, which is rendered into
    `namespace`, or if that is None into its own, which has to be `raymill`. Raises `UserError`
    without Kubernetes' client."""

    starts_in_parts = True

    def __init__(self, namespace: str | None, overlay: str | None = None) -> None:
        from cluster.kube.client import KubeApi  # noqa: PLC0415 (its client is an extra)

        self._overlay = None if overlay is None else overlay_folder(overlay)
        self._api, self._namespace = KubeApi(namespace), namespace
        self.kind, self.where, self.folders = Backend.KUBERAY, self._api.namespace, Folders.NONE
        self._needs: dict[str, Any] = {}

    def probe(self) -> None:
        self._api.all(RAY, "RayJob")

    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        self._needs = needs
        job, _ = self.manifests(config, stage)
        if (namespace := job["metadata"]["namespace"]) != self._api.namespace:
            raise ConfigError(
                f"the overlay's namespace is {namespace}, not {self._api.namespace}: give -n {namespace}"
            )

    def manifests(self, config: RunConfig, stage: str, *, number: int = 1) -> list[Object]:
        assert self._overlay is not None, "submitting takes an overlay"
        name = self.name(str(config.run_id), number)
        return rayjob(
            rendered_overlay(self._overlay, self._namespace),
            config,
            stage,
            name=name,
            needs=self._needs,
        )

    def name(self, run_id: str, number: int) -> str:
        return rayjob_name(run_id, number)

    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """Applies the job first: it owns its settings, so Kubernetes removes them with it; its pods
        wait for them."""
        job, settings = self.manifests(config, record.stage, number=record.number)
        try:
            made = self._api.apply(job)
            # By force: `complete` may have been faster
            self._api.apply(_owned(settings, made), force=True)
        except BaseException:
            # An interrupt too: a job without its settings would hold its pods for a week.
            with suppress(ClusterError):  # who does not answer is asked again by `may_be_there`
                self._api.delete(RAY, "RayJob", record.job)
            raise
        return record

    def complete(self, config: RunConfig, record: JobRecord) -> None:
        made = self._api.get(RAY, "RayJob", record.job)
        if made is None:
            self.start(config, record)
        elif not has_ended(made):
            _, settings = self.manifests(config, record.stage, number=record.number)
            self._api.create(_owned(settings, made))

    def may_be_there(self, record: JobRecord) -> bool:
        return self._api.get(RAY, "RayJob", record.job) is not None

    def strays(self, record: JobRecord) -> list[str]:
        jobs = [
            job
            for job in self._api.all(RAY, "RayJob")
            if run_of(job) == record.run_id and not has_ended(job)
        ]
        names = [
            str(job["metadata"]["name"])
            for job in jobs
            if "deletionTimestamp" not in job["metadata"]
        ]
        return [name for name in names if name != record.job]

    def state(self, record: JobRecord) -> JobState | None:
        job = self._api.get(RAY, "RayJob", record.job)
        if job is None:
            return None
        status = job.get("status") or {}
        ray_status = status.get("jobStatus", "")
        if has_ended(job):
            return (
                JobState(ray_status.lower())
                if ray_status in ("SUCCEEDED", "STOPPED")
                else JobState.FAILED
            )
        is_running = status.get("jobDeploymentStatus") == "Running" and ray_status == "RUNNING"
        return JobState.RUNNING if is_running else JobState.PENDING

    def stop(self, record: JobRecord) -> None:
        """Deletes the object: its pods are drained, so the run saves, and it cannot be resumed
        beside a later job."""
        for name in (record.job, *self.strays(record)):
            self._api.delete(RAY, "RayJob", name)


def _owned(settings: Object, job: Object) -> Object:
    """Returns the settings with the job, which Kubernetes has made, as their owner."""
    owner = {
        "apiVersion": RAY,
        "kind": "RayJob",
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
    }
    return settings | {"metadata": settings["metadata"] | {"ownerReferences": [owner]}}
