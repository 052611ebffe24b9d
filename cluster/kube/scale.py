"""Makes the JSON patches that scale, suspend or resume a Ray object, and keeps their settings when
the object is applied again. Pure."""

import copy
from typing import Any

import yaml

from cluster.kube.status import Object, cluster_spec
from cluster.settings.parser import ConfigError

Patch = list[dict[str, Any]]

SCALED = "raymill/scaled."
"""Prefix, before a group's name, of the annotation with the bounds that `scale` found and set, such
as `0-4 2-6`."""


def scale_group(
    manifest: Object, group: str | None, *, lowest: int | None, most: int | None
) -> Patch:
    """Sets new bounds of a worker group, by default the only one. Ray's autoscaler obeys them at
    once."""
    index, found = _group(manifest, group)
    name = found["groupName"]
    new_lowest = found.get("minReplicas", 0) if lowest is None else lowest
    new_most = found.get("maxReplicas", 0) if most is None else most
    if not 0 <= new_lowest <= new_most:
        raise ConfigError(
            f"the group {name} would have {new_lowest} to {new_most} pods; expected 0 <= min <= max"
        )
    # A group that is scaled twice still has its manifest's bounds noted
    noted = _scaled(manifest, found)
    note = f"{noted or _text(found)} {new_lowest}-{new_most}"
    inside = {"RayJob": "/rayClusterSpec", "RayService": "/rayClusterConfig"}.get(
        manifest["kind"], ""
    )
    at = f"/spec{inside}/workerGroupSpecs/{index}"
    return [
        # Fails if the groups were reordered
        {"op": "test", "path": f"{at}/groupName", "value": name},
        _add(f"{at}/minReplicas", new_lowest),
        _add(f"{at}/maxReplicas", new_most),
        *([] if manifest["metadata"].get("annotations") else [_add("/metadata/annotations", {})]),
        _add(
            f"/metadata/annotations/{(SCALED + name).replace('~', '~0').replace('/', '~1')}", note
        ),
    ]


def as_applied(manifest: Object, live: Object | None) -> tuple[Object, list[str]]:
    """Returns the manifest with the live object's values of what the overlay does not decide, and
    lines that say which: the number of pods that the autoscaler requests, the bounds that `scale`
    set since the overlay last changed them, and whether the object is suspended."""
    if live is None:
        return manifest, []
    wanted, kept = copy.deepcopy(manifest), []
    wanted["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
    if "suspend" in wanted["spec"]:  # Kueue's from then on
        wanted["spec"]["suspend"] = bool(live["spec"].get("suspend"))
    running = {
        group["groupName"]: group for group in cluster_spec(live).get("workerGroupSpecs", [])
    }
    for group in cluster_spec(wanted).get("workerGroupSpecs", []):
        name, keys = group["groupName"], ["replicas", "scaleStrategy"]
        if (found := running.get(name)) is None:
            continue
        if _scaled(live, found) == _text(group):
            keys += ["minReplicas", "maxReplicas"]
            bounds = f"{found['minReplicas']} to {found['maxReplicas']} pods"
            kept.append(f"{name}: {bounds}, as `raymill cluster scale` left it")
        group |= {key: found[key] for key in keys if key in found}
    return wanted, kept


def bounds_of_owner(cluster: Object, owner: Object) -> tuple[Patch, list[str]]:
    """Returns the patch by which a running RayCluster gets the bounds of the job or service that
    made it, to which KubeRay passes none, and a line for each group that it changes."""
    wanted = {
        group["groupName"]: group for group in cluster_spec(owner).get("workerGroupSpecs", [])
    }
    patch: Patch = []
    lines = []
    for index, group in enumerate(cluster["spec"].get("workerGroupSpecs", [])):
        name = group["groupName"]
        if name not in wanted or _text(wanted[name]) == _text(group):
            continue
        at, bounds = f"/spec/workerGroupSpecs/{index}", wanted[name]
        # Fails if the groups were reordered
        patch.append({"op": "test", "path": f"{at}/groupName", "value": name})
        patch += [_add(f"{at}/{key}", bounds.get(key, 0)) for key in ("minReplicas", "maxReplicas")]
        lines.append(
            f"{name}: {bounds.get('minReplicas', 0)} to {bounds.get('maxReplicas', 0)} pods"
        )
    return patch, lines


def most_replicas(service: Object) -> int | None:
    """Returns the number of replicas that a RayService's own settings allow, if they say it."""
    settings = yaml.safe_load(service["spec"].get("serveConfigV2", "")) or {}
    arguments = [application.get("args", {}) for application in settings.get("applications", [])]
    found = [
        most
        for given in arguments
        if (most := given.get("replicas", {}).get("max_replicas")) is not None
    ]
    return sum(found) if found else None


def suspend(manifest: Object, *, suspended: bool) -> Patch:
    """Suspends or resumes all, head and workers. A resumed job restarts, and its run continues
    under its `run_id`."""
    if bool(manifest["spec"].get("suspend")) is suspended:
        raise ConfigError(
            f"{manifest['metadata']['name']} is {'' if suspended else 'not '}suspended already"
        )
    queue = manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue:
        raise ConfigError(
            f"{manifest['metadata']['name']} is in the queue {queue}: Kueue suspends and resumes it"
        )
    return [_add("/spec/suspend", suspended)]


def _group(manifest: Object, name: str | None) -> tuple[int, Object]:
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    named = [
        (index, group) for index, group in enumerate(groups) if name in (None, group["groupName"])
    ]
    if len(named) != 1:
        names = ", ".join(group["groupName"] for group in groups)
        raise ConfigError(
            f"{manifest['metadata']['name']} has the groups {names}; name one of them with --group"
        )
    return named[0]


def _scaled(manifest: Object, group: Object) -> str | None:
    """Returns the bounds from before the group was scaled, if it still has those that it was scaled
    to."""
    before, _, after = (
        manifest["metadata"]
        .get("annotations", {})
        .get(SCALED + group["groupName"], "")
        .partition(" ")
    )
    return before if after and after == _text(group) else None


def _text(group: Object) -> str:
    return f"{group.get('minReplicas', 0)}-{group.get('maxReplicas', 0)}"


def _add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}
