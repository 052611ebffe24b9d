"""`raymill cluster`: applies the manifests to Kubernetes, and explains and scales what runs there."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.kube.idle import GroupBounds, NodeUse, why_not_idle
from cluster.kube.kustomize import rendered_overlay
from cluster.kube.pending import is_pending, why_not_made, why_pending
from cluster.kube.scale import Patch, resume_group, scale_group, suspend, suspend_group
from cluster.kube.status import KINDS, Object, cluster_spec, groups, sentence
from cluster.settings.code_folders import CODE_ROOT
from cluster.settings.parser import ConfigError
from cluster.stages.jobs_api import JobsApi, ray_token
from model.errors import UserError

if TYPE_CHECKING:
    from cluster.kube.client import KubeApi

_RAY = "ray.io/v1"
_COMPONENT = "app.kubernetes.io/component"
_OVERLAYS = CODE_ROOT / "cluster" / "k8s" / "overlays"  # a link, so that a wheel has them too


def render(arguments: argparse.Namespace) -> dict[str, Any] | None:
    return shown_objects(_objects(arguments), arguments)


def shown_objects(objects: list[Object], arguments: argparse.Namespace, **fields: Any) -> dict[str, Any] | None:
    """Returns the objects with `fields` for --json, or else prints them as YAML."""
    if arguments.json:
        return {**fields, "objects": objects}
    sys.stdout.write(yaml.safe_dump_all(objects, sort_keys=False))
    return None


def apply(arguments: argparse.Namespace) -> dict[str, Any]:
    objects, api = _objects(arguments), _api(arguments)
    for manifest in objects:
        api.apply(manifest, dry_run=arguments.dry_run)
    return {"checked" if arguments.dry_run else "applied": [_name(manifest) for manifest in objects]}


def scale(arguments: argparse.Namespace) -> dict[str, Any]:
    api = _api(arguments)
    manifest = _find(api, arguments.name)
    if manifest["kind"] == "RayJob" and (arguments.group or not (arguments.suspend or arguments.resume)):
        manifest = _cluster_of(api, manifest)  # KubeRay copies a job's groups to its cluster only once
    api.patch(manifest, _change(arguments, manifest))
    changed = api.get(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
    return {"changed": _name(manifest), "groups": list(groups(changed or manifest))}


def _change(arguments: argparse.Namespace, manifest: Object) -> Patch:
    if arguments.suspend or arguments.resume:
        if arguments.lowest is not None or arguments.most is not None:
            raise ConfigError("--suspend and --resume exclude --min and --max")
        if arguments.group is None:
            return suspend(manifest, suspended=arguments.suspend)
        return (suspend_group if arguments.suspend else resume_group)(manifest, arguments.group)
    if arguments.lowest is None and arguments.most is None:
        raise ConfigError("nothing to change: give --min, --max, --suspend or --resume")
    return scale_group(manifest, arguments.group, lowest=arguments.lowest, most=arguments.most)


def status(arguments: argparse.Namespace) -> dict[str, Any]:
    found = _all(_api(arguments), arguments.name)
    return {_name(manifest): [sentence(manifest), *groups(manifest)] for manifest in found}


def pending(arguments: argparse.Namespace) -> dict[str, Any]:
    api = _api(arguments)
    found = _all(api, arguments.name)
    clusters = {_cluster_name(manifest) for manifest in found}
    events = defaultdict(list)
    for event in api.all("v1", "Event"):
        events[event["involvedObject"].get("name")].append(event)
    reasons = {
        pod["metadata"]["name"]: why_pending(pod, events[pod["metadata"]["name"]])
        for pod in api.all("v1", "Pod", selector="ray.io/is-ray-node=yes")
        if pod["metadata"]["labels"].get("ray.io/cluster") in clusters and is_pending(pod)
    }
    for manifest in found:
        suspended = manifest["spec"].get("suspend")
        reason = sentence(manifest) if suspended else why_not_made(events[manifest["metadata"]["name"]])
        if reason:
            reasons[_name(manifest)] = reason
    return reasons or {"pending": "nothing: every requested pod runs"}


def not_idle(arguments: argparse.Namespace) -> dict[str, Any]:
    api = _api(arguments)
    manifest = _find(api, arguments.name)
    cluster = manifest if manifest["kind"] == "RayCluster" else _cluster_of(api, manifest)
    pods = api.all("v1", "Pod", selector=f"ray.io/cluster={cluster['metadata']['name']},ray.io/node-type=worker")
    default_s = cluster_spec(cluster)["autoscalerOptions"].get("idleTimeoutSeconds", 60)
    bounds = {
        group["groupName"]: GroupBounds(group.get("minReplicas", 0), group.get("idleTimeoutSeconds", default_s))
        for group in cluster_spec(cluster)["workerGroupSpecs"]
    }
    return why_not_idle(_node_uses(arguments.url, pods), bounds) or {"pods": "there is none but the head"}


def _node_uses(url: str, pods: list[Object]) -> list[NodeUse]:
    """Returns what each pod's node holds, from Ray's state API."""
    rows = JobsApi(url, ray_token()).state_rows
    nodes = rows("nodes", "ALIVE")
    names = {row["node_ip"]: row["node_id"] for row in nodes} | {row["node_name"]: row["node_id"] for row in nodes}
    tasks, actors = rows("tasks", "RUNNING"), rows("actors", "ALIVE")
    reserved = rows("placement_groups", "CREATED")

    def use(pod: Object) -> NodeUse:
        metadata = pod["metadata"]
        node_id = names.get(metadata["name"], names.get(pod["status"].get("podIP", "")))
        return NodeUse(
            metadata["name"],
            metadata["labels"]["ray.io/group"],
            tasks=tuple(row["name"] for row in tasks if row["node_id"] == node_id and row["type"] == "NORMAL_TASK"),
            actors=tuple(row["class_name"] for row in actors if row["node_id"] == node_id),
            placement_groups=sum(any(bundle["node_id"] == node_id for bundle in row["bundles"]) for row in reserved),
        )

    return list(map(use, pods))


def _objects(arguments: argparse.Namespace) -> list[Object]:
    objects = rendered_overlay(overlay_folder(arguments.overlay))
    if arguments.component is None:
        return objects
    chosen = [o for o in objects if o["metadata"].get("labels", {}).get(_COMPONENT) == arguments.component]
    if not chosen:
        known = sorted({o["metadata"]["labels"][_COMPONENT] for o in objects if "labels" in o["metadata"]})
        raise ConfigError(f"unknown component {arguments.component!r}; expected one of {', '.join(known)}")
    return chosen


def overlay_folder(name: str) -> Path:
    """Returns the folder of one of raymill's overlays by its name, or the named folder."""
    for folder in (_OVERLAYS / name, Path(name)):
        if folder.is_dir():
            return folder
    known = sorted(folder.name for folder in _OVERLAYS.glob("*") if folder.is_dir())
    choices = f"one of {', '.join(known)}, or the folder" if known else "there is no k8s/ here, so name the folder"
    raise ConfigError(f"unknown overlay {name!r}, expected {choices} of your own kustomization")


def _api(arguments: argparse.Namespace) -> "KubeApi":
    from cluster.kube.client import KubeApi

    return KubeApi(arguments.namespace)


def _all(api: "KubeApi", name: str | None) -> list[Object]:
    if name is not None:
        return [_find(api, name)]
    found = [manifest for kind in KINDS for manifest in api.all(_RAY, kind)]
    if not found:
        kinds = "RayCluster, RayJob or RayService"
        raise UserError(f"the namespace {api.namespace} has no {kinds}: `raymill cluster apply` makes them")
    owned = {_cluster_name(manifest) for manifest in found if manifest["kind"] != "RayCluster"}
    return [o for o in found if o["kind"] != "RayCluster" or o["metadata"]["name"] not in owned]


def _find(api: "KubeApi", name: str) -> Object:
    """Returns the object called `NAME`, or `KIND/NAME` where several kinds share the name."""
    kind, _, plain = name.rpartition("/")
    kinds = [known for known in KINDS if kind.lower() in ("", known.lower())]
    if not kinds:
        raise ConfigError(f"unknown kind {kind!r}; expected {', '.join(known.lower() for known in KINDS)}")
    found = [manifest for known in kinds if (manifest := api.get(_RAY, known, plain)) is not None]
    if not found:
        names = ", ".join(_name(manifest) for manifest in (m for known in KINDS for m in api.all(_RAY, known)))
        raise UserError(f"the namespace {api.namespace} has no {name}; it has {names or 'none'}")
    if len(found) > 1:
        raise ConfigError(f"{name} may be {' or '.join(map(_name, found))}; say which")
    return found[0]


def _cluster_of(api: "KubeApi", manifest: Object) -> Object:
    """Returns the RayCluster that KubeRay made for a job or service."""
    name = _cluster_name(manifest)
    cluster = api.get(_RAY, "RayCluster", name) if name else None
    if cluster is None:
        raise UserError(f"{_name(manifest)} has no cluster now: it {sentence(manifest)}")
    return cluster


def _cluster_name(manifest: Object) -> str | None:
    state = manifest.get("status") or {}
    if manifest["kind"] == "RayCluster":
        return str(manifest["metadata"]["name"])
    return state.get("rayClusterName") or (state.get("activeServiceStatus") or {}).get("rayClusterName")


def _name(manifest: Object) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"
