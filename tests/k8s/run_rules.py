"""Everything that the manifests start exists and fits: entry points, embedded settings, and pods
that can hold the work."""

import importlib
import importlib.util
import inspect
import shlex
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cluster.settings.run import RunConfig
from cluster.settings.serve import ServeConfig
from cluster.settings.stages import EvaluateConfig
from tests.k8s.manifests import (
    CLUSTER_KINDS,
    GPU,
    Manifest,
    cluster_spec,
    find,
    name_of,
    of_kind,
    quantity,
)

VLLM_IMAGE = "raymill-gpu"  # k8s/Dockerfile's `gpu` build
_GPU_PRODUCTS = {
    "nvidia.com/gpu.product",
    "eks.amazonaws.com/instance-gpu-name",
    "cloud.google.com/gke-accelerator",
}


def run_config(objects: list[Manifest]) -> RunConfig:
    return RunConfig.model_validate(
        yaml.safe_load(find(objects, "ConfigMap/run-config")["data"]["run.yaml"])
    )


def evaluate_config(objects: list[Manifest]) -> EvaluateConfig:
    data = find(objects, "ConfigMap/run-config")["data"]
    return EvaluateConfig.model_validate(yaml.safe_load(data["evaluate.yaml"]))


def serve_config(service: Manifest) -> ServeConfig:
    return ServeConfig.model_validate(_deployment(service)["applications"][0]["args"])


def _deployment(service: Manifest) -> dict[str, Any]:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def config_problems(objects: list[Manifest]) -> list[str]:
    """`cluster.settings.run` and Ray Serve accept the settings."""
    problems = []
    try:
        run = run_config(objects)
        if run.run_id is None or not run.data.source:
            problems.append(
                "run.yaml: a job that is retried needs a run_id, and any job a data.source"
            )
    except ValidationError as error:
        problems.append(f"run.yaml: {error}")
    try:
        evaluate_config(objects)
    except ValidationError as error:
        problems.append(f"evaluate.yaml: {error}")
    for service in of_kind(objects, "RayService"):
        deployment = _deployment(service)
        try:
            ServeDeploySchema.model_validate(deployment)
            config = serve_config(service)
        except ValidationError as error:
            problems.append(f"{name_of(service)}: serveConfigV2: {error}")
            continue
        http = deployment["http_options"]
        if (http["host"], http["port"]) != (config.host, config.port):
            problems.append(f"{name_of(service)}: http_options and args name two addresses")
        levels: list[tuple[dict[str, Any], type[BaseModel]]] = [
            (deployment, ServeDeploySchema),
            (http, HTTPOptionsSchema),
        ]
        levels += [
            (application, ServeApplicationSchema) for application in deployment["applications"]
        ]
        for values, schema in levels:  # Ray Serve ignores a field that it does not know
            unknown = sorted(values.keys() - schema.model_fields.keys())
            problems += [f"{name_of(service)}: serveConfigV2: {key} is unknown" for key in unknown]
    return problems


def entry_problems(objects: list[Manifest]) -> list[str]:
    """Each entry point is in the repository, and its files are where it looks for them."""
    problems = []
    for job in of_kind(objects, "RayJob"):
        _, _, *modules, path = shlex.split(job["spec"]["entrypoint"])
        for module in modules:
            if importlib.util.find_spec(module) is None:
                problems.append(f"{name_of(job)}: no module {module}")
        groups = [cluster_spec(job)["headGroupSpec"]]
        problems += _mount_problems(
            name_of(job), groups, path, kind="configMap", volume="run-config"
        )
        if PurePosixPath(path).name not in find(objects, "ConfigMap/run-config")["data"]:
            problems.append(f"{name_of(job)}: {path} is not among the settings")
    for service in of_kind(objects, "RayService"):
        cluster = cluster_spec(service)
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for application in _deployment(service)["applications"]:
            module, _, name = application["import_path"].partition(":")
            builder = getattr(importlib.import_module(module), name, None)
            if builder is None or not _builds_from_serve_config(builder):
                problems.append(
                    f"{name_of(service)}: {application['import_path']} is no builder from a ServeConfig"
                )
            path = application["args"]["api_key_file"]
            problems += _mount_problems(
                name_of(service), groups, path, kind="secret", volume="api-keys"
            )
    return problems


def _builds_from_serve_config(builder: Callable[..., Any]) -> bool:
    """Ray Serve makes the arguments an object of the annotated class; with any other annotation
    they stay a dict."""
    signature = inspect.signature(builder)
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    return annotations == [ServeConfig] and signature.return_annotation is serve.Application


def _mount_problems(
    name: str, groups: list[Manifest], path: str, *, kind: str, volume: str
) -> list[str]:
    for group in groups:
        spec = group["template"]["spec"]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]
        }
        volumes = {v["name"] for v in spec["volumes"] if kind in v}
        if volume not in volumes or mounts.get(volume) != str(PurePosixPath(path).parent):
            return [f"{name}: {path} is not mounted from {kind} {volume}"]
    return []


def storage_problems(objects: list[Manifest]) -> list[str]:
    """Jobs publish where the endpoint looks, which is not a pod's own disk."""
    written = run_config(objects).storage.uri
    problems = (
        []
        if written.startswith("s3://")
        else [f"{written} goes with its pod: storage.uri must be s3://"]
    )
    readers = {
        name_of(service): serve_config(service).storage.uri
        for service in of_kind(objects, "RayService")
    }
    readers["evaluate.yaml"] = evaluate_config(objects).storage.uri
    problems += [
        f"jobs write to {written}, {name} reads from {uri}"
        for name, uri in readers.items()
        if uri != written
    ]
    return problems


def capacity_problems(objects: list[Manifest]) -> list[str]:
    """The groups hold exactly the workers and replicas that the settings ask for."""
    trainer, server = find(objects, "RayJob/pretrain"), find(objects, "RayService/completions")
    scaling, replicas = run_config(objects).scaling, serve_config(server).replicas
    evaluator, evaluation = find(objects, "RayJob/evaluate"), evaluate_config(objects)
    checks = [
        (evaluator, evaluation.threads_per_worker, 0, evaluation.num_workers, "evaluating workers"),
        (
            trainer,
            scaling.threads_per_worker,
            int(scaling.use_gpu),
            scaling.max_workers,
            "training workers",
        ),
        (
            server,
            replicas.threads_per_replica,
            _gpus_a_replica(server),
            replicas.max_replicas,
            "replicas",
        ),
    ]
    problems = []
    for manifest, cpus, gpus, wanted, what in checks:
        # Each alone: a second one stands in for the first
        for group in cluster_spec(manifest)["workerGroupSpecs"]:
            places = _places(group, cpus, gpus=gpus)
            if places != wanted:
                problems.append(
                    f"{name_of(manifest)}: room for {places} {what}, but the settings ask for up to {wanted}"
                )
    lowest = sum(group["minReplicas"] for group in cluster_spec(server)["workerGroupSpecs"])
    if lowest < replicas.min_replicas:
        problems.append(
            f"{name_of(server)}: keeps {lowest} pods for {replicas.min_replicas} replicas"
        )
    return problems


def _gpus_a_replica(service: Manifest) -> int:
    engine = serve_config(service).engine
    return engine.tensor_parallel_size if engine.device == "cuda" else 0


def gpu_problems(objects: list[Manifest]) -> list[str]:
    """A group with GPUs names their product, tolerates their taint and, unless it serves, goes down
    to none.

    Pods that need no GPU get none, and vLLM computes where the image has it.
    """
    problems = []
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        for group in cluster_spec(manifest)["workerGroupSpecs"]:
            spec, where = (
                group["template"]["spec"],
                f"{name_of(manifest)} group {group['groupName']}",
            )
            if not _gpus(group):
                continue
            if not any(
                toleration["key"] == "nvidia.com/gpu" for toleration in spec.get("tolerations", [])
            ):
                problems.append(f"{where}: does not tolerate the taint of GPU nodes")
            if not _GPU_PRODUCTS & spec.get("nodeSelector", {}).keys():
                problems.append(f"{where}: takes whatever GPU there is")
            if "cloud.google.com/gke-accelerator" in spec.get(
                "nodeSelector", {}
            ) and not _finds_gke_driver(objects):
                problems.append(f"{where}: does not look where GKE puts the driver")
            if group["minReplicas"] != 0 and manifest["kind"] != "RayService":
                problems.append(f"{where}: holds GPUs while idle")
            by_run = name_of(manifest) == "RayJob/pretrain" and run_config(objects).scaling.use_gpu
            by_replicas = manifest["kind"] == "RayService" and _gpus_a_replica(manifest) > 0
            # Whose users know
            if not by_run and not by_replicas and manifest["kind"] != "RayCluster":
                problems.append(f"{where}: asks for GPUs that nothing uses")
    for service in of_kind(objects, "RayService"):
        images = [
            group["template"]["spec"]["containers"][0]["image"].partition(":")[0].rpartition("/")[2]
            for group in cluster_spec(service)["workerGroupSpecs"]
        ]
        if serve_config(service).engine.runs_vllm and images != [VLLM_IMAGE] * len(images):
            problems.append(
                f"{name_of(service)}: vLLM is to compute, which only the image {VLLM_IMAGE} has"
            )
    return problems


def _finds_gke_driver(objects: list[Manifest]) -> bool:
    return (
        find(objects, "ConfigMap/ray-environment")["data"].get("LD_LIBRARY_PATH")
        == "/usr/local/nvidia/lib64"
    )


def _gpus(group: Manifest) -> int:
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))


def _places(group: Manifest, cpus: int, *, gpus: int) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    fit = int(quantity(limits["cpu"])) // cpus
    return int(group["maxReplicas"]) * (min(fit, _gpus(group) // gpus) if gpus else fit)


RULES = (config_problems, entry_problems, storage_problems, capacity_problems, gpu_problems)
