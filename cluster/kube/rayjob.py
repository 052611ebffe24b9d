"""Makes a run's RayJob from the manifests of an overlay and the run's settings. Pure: objects in
and out."""

import copy
import hashlib
import re
import shlex
from typing import Any

from cluster.kube.status import RUN_ANNOTATION, Object, cluster_spec, component_of
from cluster.settings.run import RunConfig, to_yaml
from cluster.stages.run_mirrored import entrypoint
from cluster.stages.stage_module import STAGES
from cluster.submission.preflight import AdmissionError

COMPONENTS = {"tokenize": "tokenize", "pretrain": "pretrain", "pipeline": "pretrain"}
"""The component whose RayJob a stage copies, with its pods and network policies."""

RUN_LABEL = "raymill/run"
"""Label of a submitted run's pods: the name of its RayJobs without their number."""

_VOLUME, _PATH = "run-config", "/config/run.yaml"
_NAME_CHARS = 36  # KubeRay allows 47 for a RayJob, and the number follows


def rayjob(
    objects: list[Object], config: RunConfig, stage: str, *, name: str, needs: dict[str, Any]
) -> list[Object]:
    """Returns a RayJob and the ConfigMap of its settings. Raises `AdmissionError` if the pods are
    too small."""
    component = COMPONENTS[stage]
    found = [o for o in objects if o["kind"] == "RayJob" and component_of(o) == component]
    if len(found) != 1:
        raise AdmissionError(
            f"the overlay has {len(found)} RayJobs of the component {component!r}; expected one"
        )
    job = copy.deepcopy(found[0])
    labels = job["metadata"]["labels"]
    annotations = job["metadata"].get("annotations", {})
    job["metadata"] |= {
        "name": name,
        "annotations": annotations | {RUN_ANNOTATION: str(config.run_id)},
    }
    _label_with_run(job, name.rpartition("-")[0])
    job["spec"]["entrypoint"] = shlex.join(entrypoint(STAGES[stage], _PATH, job=name))
    for volume in cluster_spec(job)["headGroupSpec"]["template"]["spec"]["volumes"]:
        if volume["name"] == _VOLUME:
            volume["configMap"]["name"] = name
    if stage != "tokenize":
        for group in cluster_spec(job)["workerGroupSpecs"]:  # a second one stands in for the first
            _fit_group(group, config, needs)
    settings: Object = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": job["metadata"]["namespace"],
            "labels": dict(labels),
        },
        "data": {"run.yaml": to_yaml(config)},
    }
    return [job, settings]


def _label_with_run(job: Object, run: str) -> None:
    """Labels the job and each of its pods with the run, whose cost tools may sum by it: the names of
    Ray clusters change with each attempt."""
    cluster = cluster_spec(job)
    templates = [
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
        job["spec"]["submitterPodTemplate"],
    ]
    for metadata in (job["metadata"], *(template["metadata"] for template in templates)):
        metadata["labels"] = metadata["labels"] | {RUN_LABEL: run}


def rayjob_name(run_id: str, number: int) -> str:
    """Returns a name that Kubernetes accepts: the run's id, or something like it with a hash of
    it."""
    plain = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
    if plain != run_id or len(plain) > _NAME_CHARS:
        plain = f"{plain[: _NAME_CHARS - 7].strip('-')}-{hashlib.sha256(run_id.encode()).hexdigest()[:6]}"
    return f"run-{plain}-{number}"  # names of services begin with a letter


def _fit_group(group: Object, config: RunConfig, needs: dict[str, Any]) -> None:
    """Sets the group's bounds to the pods that `scaling.max_workers` workers fill."""
    from kubernetes.utils import parse_quantity  # noqa: PLC0415 (an extra, which takes seconds)

    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    scaling, name = config.scaling, group["groupName"]
    cpus = float(parse_quantity(limits["cpu"]))
    memory = float(parse_quantity(limits["memory"]))
    need = needs["worker_bytes"]
    rooms = {
        f"scaling.threads_per_worker={scaling.threads_per_worker}, and the pods have {cpus:g} CPUs": (
            cpus // scaling.threads_per_worker
        ),
        f"it needs about {need / 1e9:.1f} GB of memory, and the pods have {memory / 1e9:.1f} GB": memory
        // need,
    }
    if scaling.use_gpu:
        rooms["scaling.use_gpu, and the pods have no GPU"] = float(
            parse_quantity(limits.get("nvidia.com/gpu", "0"))
        )
    for problem, room in rooms.items():
        if room < 1:
            raise AdmissionError(f"the group {name} cannot hold a worker: {problem}")
    pods = -(-scaling.max_workers // int(min(rooms.values())))
    group |= {"maxReplicas": pods, "minReplicas": min(group.get("minReplicas", 0), pods)}
