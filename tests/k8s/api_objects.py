"""The objects of a Kubernetes API in memory, and what it does with a write: defaults, owners,
versions, subresources.

It answers as `kube-apiserver` 1.36 with KubeRay's CRDs was observed to. Not a Kubernetes: nothing
here admits or schedules.
"""

import copy
import json
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from tests.k8s.field_owners import Manager, Owners, owners_of
from tests.k8s.manifests import CRDS, cluster_spec
from tests.k8s.schema_rules import crd_problems

Object = dict[str, Any]

GROUP_DEFAULTS = {
    "maxReplicas": 2147483647,
    "minReplicas": 0,
    "numOfHosts": 1,
    "priority": 0,
    "replicas": 0,
}
"""Defaults that the CRDs fill into a worker group; a test compares them."""

RAY_DEFAULTS: dict[str, Object] = {
    "RayCluster": {},
    "RayJob": {"backoffLimit": 0, "submissionMode": "K8sJobMode", "ttlSecondsAfterFinished": 0},
    "RayService": {},
}

OPERATOR = "kuberay-operator"
_WITH_STATUS = {*RAY_DEFAULTS, "Node", "Pod", "StatefulSet", "ResourceQuota", "Namespace"}
_CLAIM_DEFAULTS = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "status": {"phase": "Pending"},
}
"""Defaults of each claim of a StatefulSet, whose list is one field: they make it differ from every
manifest's."""

NAMESPACED = {
    "/api/v1": "ConfigMap Event PersistentVolumeClaim Pod ResourceQuota Secret Service ServiceAccount",
    "/apis/apps/v1": "StatefulSet",
    "/apis/batch/v1": "Job",
    "/apis/kueue.x-k8s.io/v1beta2": "LocalQueue Workload",
    "/apis/networking.k8s.io/v1": "Ingress NetworkPolicy",
    "/apis/policy/v1": "PodDisruptionBudget",
    "/apis/ray.io/v1": "RayCluster RayJob RayService",
    "/apis/rbac.authorization.k8s.io/v1": "Role RoleBinding",
}
CLUSTER_WIDE = {
    "/api/v1": "Namespace Node",
    "/apis/admissionregistration.k8s.io/v1": "ValidatingAdmissionPolicy ValidatingAdmissionPolicyBinding",
    "/apis/kueue.x-k8s.io/v1beta2": "ClusterQueue ResourceFlavor Topology",
    "/apis/scheduling.k8s.io/v1": "PriorityClass",
}
"""The kinds that this cluster knows, by the paths of their groups."""


def plural(kind: str) -> str:
    name = kind.lower()
    name = name[:-1] + "ie" if name.endswith("y") else name
    return name + ("es" if name.endswith("s") else "s")


_CLUSTER_WIDE = {plural(kind) for kinds in CLUSTER_WIDE.values() for kind in kinds.split()}


@dataclass
class RefusedError(Exception):
    """The API refused a request."""

    code: int
    reason: str
    message: str
    details: Object | None = None

    def __str__(self) -> str:
        return self.message


class ApiObjects:
    """Holds objects by their paths, such as `/api/v1/namespaces/raymill/pods/head`. Every change
    has a number."""

    def __init__(self, *, namespaces: tuple[str, ...] = ("raymill",)) -> None:
        self.lock = threading.RLock()
        self._objects: dict[str, Object] = {}
        self._owners: dict[str, Owners] = {}
        self._version = 0
        for name in namespaces:
            self.put(
                f"/api/v1/namespaces/{name}", {"kind": "Namespace", "metadata": {"name": name}}
            )

    def get(self, path: str) -> Object | None:
        with self.lock:
            found = self._objects.get(path.removesuffix("/status"))
            if found is None:
                return None
            found = copy.deepcopy(found)
            found["metadata"]["managedFields"] = self._owners[path.removesuffix("/status")].shown()
            return found

    def put(self, path: str, value: Object, *, manager: str = OPERATOR) -> Object:
        """Writes the whole object with its status, as KubeRay and the kubelet do by an Update of
        both."""
        with self.lock:
            value = copy.deepcopy(value)
            value.setdefault("metadata", {}).pop("managedFields", None)
            before = self._objects.get(path, {})
            self._owners.setdefault(path, Owners()).update(
                before, value, Manager(manager, "Update")
            )
            return self._store(path, value)

    def delete(self, path: str) -> None:
        """Deletes the object with what it owns; a namespace with what is in it. What has finalizers
        only bears a mark until these are removed, and with it its namespace."""
        with self.lock:
            inside = self._inside(path)
            for other in inside:
                self.delete(other)
            value = self._objects.get(path)
            if value is None:
                return
            if value["metadata"].get("finalizers") or (inside and self._inside(path)):
                value["metadata"].setdefault("deletionTimestamp", now())
                return
            del self._objects[path], self._owners[path]
            for other, owned in list(self._objects.items()):
                if any(
                    owner["uid"] == value["metadata"]["uid"]
                    for owner in owned["metadata"].get("ownerReferences", [])
                ):
                    self.delete(other)
            if "/namespaces/" in path:
                space = "/api/v1/namespaces/" + path.split("/namespaces/")[1].partition("/")[0]
                if "deletionTimestamp" in self._objects.get(space, {}).get(
                    "metadata", {}
                ) and not self._inside(space):
                    self.delete(space)

    def finalize(self, path: str) -> Object | None:
        """Lets go of a namespace that is being deleted, whatever is in it."""
        with self.lock:
            namespace = self._objects.get(path)
            if namespace is None or "deletionTimestamp" not in namespace["metadata"]:
                return namespace
            del self._owners[path]
            return self._objects.pop(path)

    def _inside(self, path: str) -> list[str]:
        """Returns the paths of what is in a namespace; of nothing for other objects."""
        is_namespace = path.startswith("/api/v1/namespaces/") and path.count("/") == 4
        return [
            o
            for o in self._objects
            if is_namespace and f"/namespaces/{path.rpartition('/')[2]}/" in o
        ]

    def list(self, collection: str, selector: str = "") -> Object:
        """Returns the objects directly below `collection` that have all labels of `selector`; items
        do not say their kind."""
        pairs = [pair for pair in selector.replace("==", "=").split(",") if pair]
        wanted = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        present = {pair for pair in pairs if "=" not in pair}
        with self.lock:
            items = [
                {
                    key: item
                    for key, item in (self.get(path) or {}).items()
                    if key not in ("apiVersion", "kind")
                }
                for path, value in self._objects.items()
                if path.rpartition("/")[0] == collection
                and wanted.items() <= value["metadata"].get("labels", {}).items()
                and present <= value["metadata"].get("labels", {}).keys()
            ]
            return {
                "kind": "List",
                "metadata": {"resourceVersion": str(self._version)},
                "items": items,
            }

    def create(
        self, collection: str, value: Object, *, manager: str, dry_run: bool = False
    ) -> Object:
        path = f"{collection}/{value['metadata']['name']}"
        with self.lock:
            self._namespace_of(path)
            if path in self._objects:
                what, name = path.split("/")[-2:]
                raise RefusedError(409, "AlreadyExists", f'{what} "{name}" already exists')
            return value if dry_run else self.put(path, value, manager=manager)

    def apply(self, path: str, body: Object, *, manager: str, force: bool, dry_run: bool) -> Object:
        """Applies on the server's side."""
        if not manager:
            raise RefusedError(
                422, "Invalid", "fieldManager: Required value: is required for apply patch"
            )
        with self.lock:
            _check_scope(path)
            self._namespace_of(path)
            live, owners = (
                self._objects.get(path, {}),
                copy.deepcopy(self._owners.get(path, Owners())),
            )
            wanted = self._writable(body, path)
            version = body["metadata"].get("resourceVersion")
            if version is not None and version != live.get("metadata", {}).get("resourceVersion"):
                raise self._modified(path)
            who = Manager(manager, "Apply")
            if not force and (conflicts := owners.conflicts(live, wanted, who)):
                raise _conflict(conflicts, body["apiVersion"])
            value = owners.apply(live, wanted, who) | {
                key: body[key] for key in ("apiVersion", "kind")
            }
            value["metadata"] |= {
                key: body["metadata"][key]
                for key in ("name", "namespace")
                if key in body["metadata"]
            }
            value = defaulted({key: item for key, item in value.items() if key != "status"})
            if problems := crd_problems([value]) if CRDS.is_dir() else []:
                raise RefusedError(422, "Invalid", "; ".join(problems))
            if "status" in live:
                value["status"] = live["status"]
            if dry_run:
                return value
            self._owners[path] = owners
            return self._store(path, value)

    def patch(
        self, path: str, content_type: str, body: Any, *, manager: str = OPERATOR
    ) -> Object | None:
        """Applies a JSON patch or a merge patch to an object or its `/status`; returns None if
        there is no such object."""
        with self.lock:
            main, is_status = path.removesuffix("/status"), path.endswith("/status")
            live = self._objects.get(main)
            if live is None:
                return None
            value = copy.deepcopy(live)
            if content_type.startswith("application/json-patch"):
                for step in body:
                    change(value, step)
            else:
                value = merged(value, body)
            # A write changes the status or all else, never both
            if live.get("kind") in _WITH_STATUS:
                rest = live if is_status else value
                status = value if is_status else live
                value = {key: item for key, item in rest.items() if key != "status"}
                value |= {"status": status["status"]} if "status" in status else {}
            if value["metadata"].get("resourceVersion") != live["metadata"]["resourceVersion"]:
                raise self._modified(main)
            if is_shown := "managedFields" in value["metadata"]:  # which only who writes them sends
                self._owners[main] = owners_of(value["metadata"].pop("managedFields"))
            who = Manager(manager, "Update", "status" if is_status else "")
            if not is_shown:
                self._owners[main].update(live, value, who)
            return self._store(main, value)

    def event(
        self, of: Object, reason: str, message: str, *, kind: str = "Normal", at: str = ""
    ) -> None:
        """Records an event, in the form that older controllers use."""
        metadata = of["metadata"]
        name, namespace = (
            f"{metadata['name']}.{uuid.uuid4().hex[:16]}",
            metadata.get("namespace", "raymill"),
        )
        about = {
            "kind": of["kind"],
            "name": metadata["name"],
            "namespace": namespace,
            "uid": metadata.get("uid", ""),
        }
        at = at or now()
        event = {
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": about,
            "reason": reason,
            "message": message,
            "type": kind,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "eventTime": None,
            "count": 1,
        }
        self.put(f"/api/v1/namespaces/{namespace}/events/{name}", event)

    def _store(self, path: str, value: Object) -> Object:
        self._version += 1
        before, value = self._objects.get(path), defaulted(copy.deepcopy(value))
        kept = (before or {}).get("metadata", {})
        metadata = value.setdefault("metadata", {})
        metadata["uid"] = kept.get("uid", metadata.get("uid") or str(uuid.uuid4()))
        metadata["creationTimestamp"] = kept.get(
            "creationTimestamp", metadata.get("creationTimestamp") or now()
        )
        is_changed = before is None or value.get("spec") != before.get("spec")
        metadata["generation"] = kept.get("generation", 0) + is_changed
        metadata["resourceVersion"] = str(self._version)
        self._objects[path] = value
        found = self.get(path)
        assert found is not None
        if (
            "deletionTimestamp" in metadata
            and kept.get("finalizers")
            and not metadata.get("finalizers")
        ):
            self.delete(path)
        return found

    def _writable(self, body: Object, path: str) -> Object:
        """Returns what an apply may write of the object."""
        held = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")
        wanted = {
            key: item
            for key, item in body.items()
            if key != "status" or body["kind"] not in _WITH_STATUS
        }
        wanted["metadata"] = {
            key: item for key, item in body["metadata"].items() if key not in held
        }
        assert body["metadata"]["name"] == path.rpartition("/")[2]
        return wanted

    def _namespace_of(self, path: str) -> None:
        """Refuses a write into a namespace that does not exist."""
        parts = path.split("/namespaces/")
        if len(parts) == 2 and "/" in parts[1]:
            name = parts[1].split("/")[0]
            if f"/api/v1/namespaces/{name}" not in self._objects:
                details = {"name": name, "kind": "namespaces"}
                raise RefusedError(404, "NotFound", f'namespaces "{name}" not found', details)

    def _modified(self, path: str) -> RefusedError:
        what, name = path.split("/")[-2:]
        message = (
            f'Operation cannot be fulfilled on {what} "{name}": the object has been modified; please apply your '
            "changes to the latest version and try again"
        )
        return RefusedError(409, "Conflict", message, {"name": name, "kind": what})


def defaulted(value: Object) -> Object:
    """Returns the object with the defaults of Ray's CRDs, and with those of a StatefulSet that are
    in a list."""
    if value.get("kind") == "StatefulSet":
        claims = value["spec"].get("volumeClaimTemplates", [])
        filled = [
            _CLAIM_DEFAULTS | claim | {"spec": {"volumeMode": "Filesystem"} | claim["spec"]}
            for claim in claims
        ]
        value["spec"] = value["spec"] | ({"volumeClaimTemplates": filled} if filled else {})
        return value
    if value.get("kind") not in RAY_DEFAULTS or "spec" not in value:
        return value
    value["spec"] = RAY_DEFAULTS[value["kind"]] | value["spec"]
    cluster = cluster_spec(value)
    if "workerGroupSpecs" in cluster:
        cluster["workerGroupSpecs"] = [
            GROUP_DEFAULTS | group for group in cluster["workerGroupSpecs"]
        ]
    return value


def _check_scope(path: str) -> None:
    """Refuses a path with a namespace for a kind that is of the whole cluster."""
    if "/namespaces/" in path and path.split("/")[-2] in _CLUSTER_WIDE - {"namespaces"}:
        raise RefusedError(404, "NotFound", "the server could not find the requested resource", {})


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _conflict(conflicts: list[tuple[Manager, tuple[str, ...]]], api_version: str) -> RefusedError:
    """Returns the refusal in Kubernetes' words."""
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": f'conflict with "{owner.name}"'
            + (f" using {api_version}" if owner.operation == "Update" else ""),
            "field": "".join(f".{key}" for key in path),
        }
        for owner, path in conflicts
    ]
    number = f"{len(causes)} conflict{'s' * (len(causes) > 1)}"
    named = ", ".join(f"{cause['message']}: {cause['field']}" for cause in causes)
    return RefusedError(409, "Conflict", f"Apply failed with {number}: {named}", {"causes": causes})


def merged(value: Any, change: Any) -> Any:
    """Applies RFC 7396: objects are merged, null removes, everything else replaces."""
    if not isinstance(change, dict):
        return change
    result = dict(value) if isinstance(value, dict) else {}
    for key, item in change.items():
        if item is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), item)
    return result


def change(value: Any, step: Object) -> None:
    """Applies one operation of RFC 6902: test, add, replace or remove."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in step["path"].strip("/").split("/")
    ]
    for part in parents:
        value = value[int(part)] if isinstance(value, list) else value[part]
    if step["op"] == "test":
        found = value[int(last)] if isinstance(value, list) else value.get(last)
        if found != step["value"]:
            message = f"testing value {step['path']} failed: it is {json.dumps(found)}"
            raise RefusedError(
                422,
                "Invalid",
                f"the server rejected our request due to an error in our request: {message}",
            )
    elif step["op"] == "remove":
        del value[int(last) if isinstance(value, list) else last]
    elif isinstance(value, list) and step["op"] == "add":
        value.insert(len(value) if last == "-" else int(last), step["value"])
    else:
        value[int(last) if isinstance(value, list) else last] = step["value"]
