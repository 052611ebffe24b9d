"""Whether what the manifests start exists and fits: entry points, embedded settings, and pods that can hold the work."""

import importlib
import importlib.util
import inspect
import shlex
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.config import RunConfig, ServeConfig
from tests.k8s.manifests import Manifest, cluster_spec, find, name_of, of_kind, quantity


def run_config(objects: list[Manifest]) -> RunConfig:
    return RunConfig.model_validate(yaml.safe_load(find(objects, "ConfigMap/run-config")["data"]["run.yaml"]))


def serve_args(objects: list[Manifest]) -> dict[str, Any]:
    deploy = yaml.safe_load(find(objects, "RayService/completions")["spec"]["serveConfigV2"])
    return deploy["applications"][0]["args"]


def config_problems(objects: list[Manifest]) -> list[str]:
    """The settings are what `cluster.config` and Ray Serve take."""
    problems = []
    try:
        run = run_config(objects)
        if run.run_id is None or not run.data.source:
            problems.append("run.yaml: a job that is retried needs a run_id, and any job a data.source")
    except ValidationError as error:
        problems.append(f"run.yaml: {error}")
    for service in of_kind(objects, "RayService"):
        deploy = yaml.safe_load(service["spec"]["serveConfigV2"])
        try:
            ServeDeploySchema.model_validate(deploy)
            config = ServeConfig.model_validate(deploy["applications"][0]["args"])
        except (ValidationError, ValueError) as error:
            problems.append(f"{name_of(service)}: serveConfigV2: {error}")
            continue
        http = deploy["http_options"]
        if (http["host"], http["port"]) != (config.host, config.port):
            problems.append(f"{name_of(service)}: http_options and args name two addresses")
    return problems


def entry_problems(objects: list[Manifest]) -> list[str]:
    """What is started is in the repository, and its files are where it looks for them."""
    problems = []
    for job in of_kind(objects, "RayJob"):
        _, _, module, path = shlex.split(job["spec"]["entrypoint"])
        if importlib.util.find_spec(module) is None:
            problems.append(f"{name_of(job)}: no module {module}")
        problems += _mount_problems(job, path, "configMap", "run-config")
    for service in of_kind(objects, "RayService"):
        for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
            module, _, name = application["import_path"].partition(":")
            builder = getattr(importlib.import_module(module), name, None)
            if (
                builder is None
                or next(iter(inspect.signature(builder).parameters.values())).annotation is not ServeConfig
            ):
                problems.append(f"{name_of(service)}: {application['import_path']} does not take a ServeConfig")
            problems += _mount_problems(
                service, application["args"]["api_key_file"], "secret", "api-keys", workers=True
            )
    return problems


def _mount_problems(manifest: Manifest, path: str, kind: str, volume: str, *, workers: bool = False) -> list[str]:
    cluster = cluster_spec(manifest)
    for group in [cluster["headGroupSpec"], *(cluster["workerGroupSpecs"] if workers else [])]:
        spec = group["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {v["name"] for v in spec["volumes"] if kind in v}
        if volume not in volumes or mounts.get(volume) != str(PurePosixPath(path).parent):
            return [f"{name_of(manifest)}: {path} is not mounted from {kind} {volume}"]
    return []


def storage_problems(objects: list[Manifest]) -> list[str]:
    """Jobs publish where the endpoint looks, and that is not a pod's own disk."""
    written, read = run_config(objects).storage.uri, ServeConfig.model_validate(serve_args(objects)).storage.uri
    problems = [] if written == read else [f"jobs write to {written}, the endpoint reads from {read}"]
    if not written.startswith("s3://"):
        problems.append(f"{written} goes with its pod: storage.uri must be s3://")
    return problems


def capacity_problems(objects: list[Manifest]) -> list[str]:
    """The groups can hold the workers and replicas that the settings ask for."""
    run, serve = run_config(objects), ServeConfig.model_validate(serve_args(objects))
    trainers = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    servers = cluster_spec(find(objects, "RayService/completions"))["workerGroupSpecs"]
    places = {
        "training workers": _places(trainers, run.scaling.threads_per_worker, gpus=int(run.scaling.use_gpu)),
        "replicas": _places(servers, serve.replicas.threads_per_replica, gpus=0),
    }
    wanted = {"training workers": run.scaling.max_workers, "replicas": serve.replicas.max_replicas}
    return [
        f"room for {places[what]} {what}, but the settings ask for up to {count}"
        for what, count in wanted.items()
        if places[what] != count
    ]


def gpu_problems(objects: list[Manifest]) -> list[str]:
    """A group with GPUs tolerates their taint and goes down to none; a run that needs no GPU gets none."""
    problems = []
    for manifest in of_kind(objects, "RayJob", "RayService"):
        for group in cluster_spec(manifest)["workerGroupSpecs"]:
            spec, where = group["template"]["spec"], f"{name_of(manifest)} group {group['groupName']}"
            if not _gpus(group):
                continue
            if not any(toleration["key"] == "nvidia.com/gpu" for toleration in spec.get("tolerations", [])):
                problems.append(f"{where}: does not tolerate the taint of GPU nodes")
            if group["minReplicas"] != 0:
                problems.append(f"{where}: holds GPUs while idle")
            if name_of(manifest) != "RayJob/pretrain" or not run_config(objects).scaling.use_gpu:
                problems.append(f"{where}: asks for GPUs that nothing uses")
    return problems


def _gpus(group: Manifest) -> int:
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))


def _places(groups: list[Manifest], cpus: int, *, gpus: int) -> int:
    total = 0
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        fit = int(quantity(limits["cpu"])) // cpus
        total += group["maxReplicas"] * (min(fit, _gpus(group) // gpus) if gpus else fit)
    return total


RULES = (config_problems, entry_problems, storage_problems, capacity_problems, gpu_problems)
