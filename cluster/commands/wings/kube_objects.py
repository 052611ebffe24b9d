"""`raymill cluster`: applies the manifests to Kubernetes, and explains and scales what runs
there."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import (
    COMPONENT,
    GROUP,
    KEEPS_ON,
    KUBE_OBJECT,
    KUBE_OBJECTS,
    LEAST_PODS,
    LET_CHECK,
    MOST_PODS,
    NAMESPACE,
    OVERLAY,
    OVERLAYS_NAMESPACE,
    RESUME,
    STORAGE,
    SUSPEND,
)
from cluster.commands.command import Arguments, Result
from cluster.kube import status as kube
from cluster.kube.kustomize import overlay_folder, rendered_overlay
from cluster.kube.leftovers import PART_OF_RAYMILL, kinds_of, leftovers, removal
from cluster.kube.node_marks import (
    as_kubectl,
    conditioned,
    is_marked,
    owner_of,
    pods_of_marks,
    tainted,
    untainted,
    wanted_marks,
)
from cluster.kube.pending import reasons, warning
from cluster.kube.scale import Patch, bounds_of_owner, most_replicas, scale_group, suspend
from cluster.local.jobs_api import ClusterError
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage, StorageError, open_storage
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.kube.client import KubeApi

_MARKS_EVERY_S = 30
_PLATFORM = "platform"
"""The component with the namespace, rights and policies, which only an administrator can apply."""


def render(arguments: Arguments) -> Result:
    everything = rendered_overlay(overlay_folder(arguments[OVERLAY]), arguments[OVERLAYS_NAMESPACE])
    return Result.of_manifests(_of_component(everything, arguments[COMPONENT]))


def apply(arguments: Arguments) -> Result:
    component, is_dry = arguments[COMPONENT], arguments[LET_CHECK]
    everything = rendered_overlay(overlay_folder(arguments[OVERLAY]), arguments[OVERLAYS_NAMESPACE])
    objects = _of_component(everything, component)
    namespaces = (manifest["metadata"].get("namespace") for manifest in objects)
    api = _api(next(filter(None, namespaces), None))
    result = api.apply_all(objects, dry_run=is_dry)
    # Who may list all kinds: an administrator alone
    is_administrators = component in (None, _PLATFORM) and "note" not in result
    if "not_checked" in result:
        result["note"] = (
            "the rest needs the namespace: apply the component `platform`, then check again"
        )
    if not is_dry and (changed := _pass_bounds_on(api, result["applied"])):
        result["running"] = changed
    is_answered = "not_tried" not in result
    if is_administrators and is_answered and (left := _leftovers(api, everything)):
        result["leftovers"] = list(map(kube.full_name, left))
        result["remove"] = removal(left, api.namespace)
    return Result(result, is_bad="failed" in result)


def _pass_bounds_on(api: "KubeApi", applied: list[str]) -> dict[str, list[str]]:
    """Gives running clusters the bounds of the jobs and services that were applied. Returns a line
    for each change."""
    changed = {}
    for kind, _, name in (full.partition("/") for full in applied):
        owner = api.get(kube.RAY, kind, name) if kind in ("RayJob", "RayService") else None
        if owner is None:
            continue
        for cluster in _clusters_of(api, owner):
            patch, lines = bounds_of_owner(cluster, owner)
            if patch:
                api.patch(cluster, patch)
                changed[kube.full_name(cluster)] = lines
    return changed


def _leftovers(api: "KubeApi", everything: list[kube.Object]) -> list[kube.Object]:
    """Returns what an earlier version or another overlay left in the namespace."""
    live: list[kube.Object] = []
    for api_version, kind in kinds_of(everything):
        live += api.all(api_version, kind, selector=PART_OF_RAYMILL)
    return leftovers(live, everything)


def scale(arguments: Arguments) -> Result:
    """Changes the object, for its later clusters, and the running clusters, to which KubeRay passes
    no new bounds."""
    api = _api(arguments[NAMESPACE])
    manifest = _find(api, arguments[KUBE_OBJECT])
    if kube.has_ended(manifest):
        said = f"{kube.full_name(manifest)} {kube.sentence(manifest)}"
        raise UserError(f"{said}: nothing of it runs, and KubeRay does not start it again")
    of_all = arguments[SUSPEND] or arguments[RESUME]
    clusters = [] if of_all or manifest["kind"] == "RayCluster" else _clusters_of(api, manifest)
    patches = [(target, _change(arguments, target)) for target in (*clusters, manifest)]
    for target, patch in patches:
        api.patch(target, patch)
    result: dict[str, Any] = {"changed": [kube.full_name(target) for target, _ in patches]}
    before = clusters or [manifest]
    after = [
        api.get(kube.RAY, target["kind"], target["metadata"]["name"]) or target for target in before
    ]
    result["groups"] = [line for target in after for line in kube.groups(target)]
    if not clusters and not of_all and manifest["kind"] != "RayCluster":
        result["note"] = "it has no cluster now: the next one starts with these bounds"
    elif any(
        kube.lacks_head(new) and kube.wanted(new) < kube.wanted(old)
        for old, new in zip(before, after, strict=True)
    ):
        result["note"] = (
            "its head is not up: surplus pods stay until its autoscaler, which alone removes any, is there"
        )
    most = most_replicas(manifest) if manifest["kind"] == "RayService" else None
    if most is not None and (arguments[MOST_PODS] or 0) > most:
        result["note"] = (
            f"its settings allow {most} replicas, so more pods find no work: raise `max_replicas` too"
        )
    return Result(result)


def _change(arguments: Arguments, manifest: kube.Object) -> Patch:
    group, least, most = arguments[GROUP], arguments[LEAST_PODS], arguments[MOST_PODS]
    if arguments[SUSPEND] or arguments[RESUME]:
        if (group, least, most) != (None, None, None):
            raise ConfigError(
                "--suspend and --resume are of all; --min 0 --max 0 takes a group's pods away"
            )
        return suspend(manifest, suspended=arguments[SUSPEND])
    if least is None and most is None:
        raise ConfigError("nothing to change: give --min, --max, --suspend or --resume")
    return scale_group(manifest, group, lowest=least, most=most)


def status(arguments: Arguments) -> Result:
    api = _api(arguments[NAMESPACE])
    result, pods = {}, api.all("v1", "Pod", selector="ray.io/is-ray-node=yes")
    for manifest in _all(api, arguments[KUBE_OBJECTS]):
        clusters = _clusters_of(api, manifest)
        lines: list[str] = []
        for cluster in clusters:
            start = f"{cluster['metadata']['name']}: " if len(clusters) > 1 else ""
            lines += [f"{start}{line}" for line in kube.groups(cluster, pods)]
        told = None
        # refused, or not seen at all
        if not manifest.get("status") and not manifest["spec"].get("suspend"):
            told = warning(manifest, api.all("v1", "Event"))
        result[kube.full_name(manifest)] = [
            told or kube.sentence(manifest),
            *(lines or kube.groups(manifest)),
            *kube.cut_off_pods(clusters, pods),
        ]
    return Result(result)


def pending(arguments: Arguments) -> Result:
    api = _api(arguments[NAMESPACE])
    manifests, pods, events = (
        _all(api, arguments[KUBE_OBJECTS]),
        api.all("v1", "Pod"),
        api.all("v1", "Event"),
    )
    why: dict[str, str] = {}
    for manifest in manifests:
        why |= reasons(manifest, _clusters_of(api, manifest), pods, events)
    return Result(why or {"pending": "nothing: every requested pod runs"})


def quarantine(arguments: Arguments) -> Result:
    storage = open_storage(arguments[STORAGE])
    while arguments[KEEPS_ON]:
        try:
            changed = mark_nodes(storage)
        except (ClusterError, StorageError) as error:
            say(f"tried again in {_MARKS_EVERY_S} s: {error}")
        else:
            for what in ("marked", "released"):
                for name in changed.shown()[what]:
                    say(f"{what} {name}")
        time.sleep(_MARKS_EVERY_S)
    return Result(mark_nodes(storage).shown())


@dataclass(frozen=True)
class Marks:
    """The states of the nodes of Kubernetes, by their names."""

    marked: list[str]
    released: list[str]
    here: frozenset[str]
    """All nodes of this cluster."""
    left_out: dict[str, list[str]]
    """The pods for which a node is left out."""

    def shown(self) -> dict[str, list[str]]:
        """Returns which nodes were changed, and which are not in this cluster."""
        not_here = sorted(self.left_out.keys() - self.here)
        return {"marked": self.marked, "released": self.released, "not_here": not_here}


def mark_nodes(storage: Storage) -> Marks:
    """Marks the nodes of Kubernetes that a storage has as left out, and takes back its marks on
    others. Raises `ClusterError` with the commands for somebody who may."""
    from jobs.workers.left_out_nodes import left_out

    api, owner, records = _api(None), owner_of(storage.uri), left_out(storage)
    wanted, pods = wanted_marks(records), pods_of_marks(records)
    marked: list[str] = []
    released: list[str] = []
    here: set[str] = set()
    try:
        for node in api.nodes():
            name = node["metadata"]["name"]
            here.add(name)
            why = wanted.get(name)
            if why and (conditioned(node, why, now="") or tainted(node, owner)):
                _bring_into_line(api, name, why, owner)
                marked.append(name)
            elif name not in wanted and is_marked(node, owner):
                _bring_into_line(api, name, None, owner)
                released.append(name)
    except ClusterError as error:
        by_hand = "; ".join([str(error), *as_kubectl(wanted, owner)])
        raise ClusterError(by_hand) from None
    return Marks(marked, released, frozenset(here), pods)


def _bring_into_line(api: "KubeApi", name: str, why: str | None, owner: str) -> None:
    """Writes a node's condition, and then its taint, by which an interrupted change is seen and
    made again."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    change = tainted if why else untainted
    api.change_node(name, lambda node: conditioned(node, why, now=now), of_status=True)
    api.change_node(name, lambda node: change(node, owner))


def _of_component(objects: list[kube.Object], component: str | None) -> list[kube.Object]:
    """Returns the objects of a component, or all if it is None."""
    if component is None:
        return objects
    chosen = [o for o in objects if kube.component_of(o) == component]
    if not chosen:
        known = sorted(filter(None, set(map(kube.component_of, objects))))
        raise ConfigError(f"unknown component {component!r}; expected one of {', '.join(known)}")
    return chosen


def _api(namespace: str | None) -> "KubeApi":
    from cluster.kube.client import KubeApi

    return KubeApi(namespace)


def _all(api: "KubeApi", name: str | None) -> list[kube.Object]:
    """Returns the named object, or all but the clusters that others own."""
    if name is not None:
        return [_find(api, name)]
    found = _everything(api)
    if not found:
        kinds = "RayCluster, RayJob or RayService"
        raise UserError(
            f"the namespace {api.namespace} has no {kinds}: `raymill cluster apply` makes them"
        )
    return [manifest for manifest in found if not kube.is_owned(manifest)]


def _find(api: "KubeApi", name: str) -> kube.Object:
    """Returns the object called `NAME`, or `KIND/NAME` where several kinds share the name."""
    everything = _everything(api)
    found = [
        o for o in everything if name.lower() in (o["metadata"]["name"], kube.full_name(o).lower())
    ]
    if not found:
        names = ", ".join(map(kube.full_name, everything)) or "none"
        raise UserError(f"the namespace {api.namespace} has no {name}; it has {names}")
    if len(found) > 1:
        raise ConfigError(f"{name} may be {' or '.join(map(kube.full_name, found))}; say which")
    return found[0]


def _everything(api: "KubeApi") -> list[kube.Object]:
    return [manifest for kind in kube.KINDS for manifest in api.all(kube.RAY, kind)]


def _clusters_of(api: "KubeApi", manifest: kube.Object) -> list[kube.Object]:
    """Returns the RayClusters behind an object that are not being removed, or a RayCluster
    itself."""
    if manifest["kind"] == "RayCluster":
        return [manifest]
    found = [api.get(kube.RAY, "RayCluster", name) for name in kube.cluster_names(manifest)]
    return [
        cluster for cluster in found if cluster and "deletionTimestamp" not in cluster["metadata"]
    ]
