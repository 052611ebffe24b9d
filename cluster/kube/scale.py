"""Makes the JSON patches that scale, suspend or resume a Ray object. Pure."""

from typing import Any

from cluster.kube.status import SUSPENDED, Object, cluster_spec, suspended_bounds
from cluster.settings.parser import ConfigError

Patch = list[dict[str, Any]]


def scale_group(manifest: Object, group: str | None, *, lowest: int | None, most: int | None) -> Patch:
    """Sets new bounds of a worker group, by default the only one. Ray's autoscaler obeys them at once."""
    index, found = _group(manifest, group)
    if suspended_bounds(manifest, found["groupName"]):
        raise ConfigError(f"the group {found['groupName']} is suspended; resume it first")
    new_lowest = found.get("minReplicas", 0) if lowest is None else lowest
    new_most = found.get("maxReplicas", 0) if most is None else most
    if not 0 <= new_lowest <= new_most:
        raise ConfigError(
            f"the group {found['groupName']} would have {new_lowest} to {new_most} pods; expected 0 <= min <= max"
        )
    return _bounds(manifest, index, found, new_lowest, new_most)


def suspend_group(manifest: Object, group: str) -> Patch:
    """Sets the bounds to 0 and notes the old ones. (KubeRay's own `suspend` of a group excludes the autoscaler.)"""
    index, found = _group(manifest, group)
    if suspended_bounds(manifest, group):
        raise ConfigError(f"the group {group} is suspended already")
    note = f"{found.get('minReplicas', 0)}-{found.get('maxReplicas', 0)}"
    path = f"/metadata/annotations/{_escaped(SUSPENDED + group)}"
    annotations = [] if manifest["metadata"].get("annotations") else [_add("/metadata/annotations", {})]
    return [*_bounds(manifest, index, found, 0, 0), *annotations, _add(path, note)]


def resume_group(manifest: Object, group: str) -> Patch:
    """Restores the bounds that the group had before."""
    index, found = _group(manifest, group)
    before = suspended_bounds(manifest, group)
    if before is None:
        raise ConfigError(f"the group {group} is not suspended")
    path = f"/metadata/annotations/{_escaped(SUSPENDED + group)}"
    return [*_bounds(manifest, index, found, *before), {"op": "remove", "path": path}]


def suspend(manifest: Object, *, suspended: bool) -> Patch:
    """Suspends or resumes all, head and workers. A resumed job restarts, and its run continues under its `run_id`."""
    if bool(manifest["spec"].get("suspend")) is suspended:
        raise ConfigError(f"{manifest['metadata']['name']} is {'' if suspended else 'not '}suspended already")
    queue = manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue:
        raise ConfigError(f"{manifest['metadata']['name']} is in the queue {queue}: Kueue suspends and resumes it")
    return [_add("/spec/suspend", suspended)]


def _group(manifest: Object, name: str | None) -> tuple[int, Object]:
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    named = [(index, group) for index, group in enumerate(groups) if name in (None, group["groupName"])]
    if len(named) != 1:
        names = ", ".join(group["groupName"] for group in groups)
        raise ConfigError(f"{manifest['metadata']['name']} has the groups {names}; name one of them with --group")
    return named[0]


def _bounds(manifest: Object, index: int, group: Object, lowest: int, most: int) -> Patch:
    inside = {"RayJob": "/rayClusterSpec", "RayService": "/rayClusterConfig"}.get(manifest["kind"], "")
    at = f"/spec{inside}/workerGroupSpecs/{index}"
    return [
        {"op": "test", "path": f"{at}/groupName", "value": group["groupName"]},  # fails if the groups were reordered
        _add(f"{at}/minReplicas", lowest),
        _add(f"{at}/maxReplicas", most),
    ]


def _add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
