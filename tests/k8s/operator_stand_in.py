"""Does what KubeRay 1.7, Kubernetes' controllers, a scheduler and a kubelet do to the objects of
`api_objects.py`, a look at a time.

It acts as the real operator was observed to, or as its source says: what it writes and therefore
owns, the events and conditions that it leaves, which changes of a RayService reach a cluster that
runs, that a job which has ended is not looked at again, that Redis is cleaned before a cluster
goes, and that surplus pods are the autoscaler's to remove, which runs if the head does. Pods only
bear marks. A test says what becomes of them with `fates`.
"""

import copy
import datetime
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.k8s.api_objects import ApiObjects, now
from tests.k8s.manifests import cluster_spec

Object = dict[str, Any]
Fate = tuple[Object, list[tuple[str, str, str]]]
"""A pod's status, and its events: (type, reason, message)."""

RUNNING: Fate = ({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}, [])
_SUCCEEDED: Fate = ({"phase": "Succeeded"}, [])

_LONGEST_NAME = 53  # of a RayCluster
_HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
_NUM_GROUPS = "ray.io/num-worker-groups"
_ENDED = ("Complete", "Failed", "ValidationFailed")
_NOT_HASHED = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")


def unscheduled(message: str) -> Fate:
    """Returns the fate of a pod that the scheduler finds no node for."""
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    return {"phase": "Pending", "conditions": [condition]}, [
        ("Warning", "FailedScheduling", message)
    ]


def unmounted(message: str) -> Fate:
    """Returns the fate of a pod with a volume that the kubelet cannot mount."""
    return _waiting({"reason": "ContainerCreating"}), [("Warning", "FailedMount", message)]


def unpulled(image: str) -> Fate:
    """Returns the fate of a pod with an image that nobody has."""
    said = f'Back-off pulling image "{image}"'
    return _waiting({"reason": "ImagePullBackOff", "message": said}), [("Normal", "BackOff", said)]


def _waiting(state: Object) -> Object:
    waiting = {
        "name": "ray-head",
        "image": "i",
        "imageID": "",
        "restartCount": 0,
        "ready": False,
        "state": {"waiting": state},
    }
    ready = {
        "type": "Ready",
        "status": "False",
        "reason": "ContainersNotReady",
        "message": "containers with unready status: [ray-head autoscaler]",
    }
    scheduled = {"type": "PodScheduled", "status": "True"}
    return {"phase": "Pending", "conditions": [scheduled, ready], "containerStatuses": [waiting]}


@dataclass
class OperatorStandIn:
    api: ApiObjects
    namespace: str = "raymill"
    fates: list[tuple[Callable[[Object], bool], Fate]] = field(default_factory=list)
    """Conditions with fates: a pod gets the fate of the first that it fulfills, and runs if it
    fulfills none."""
    cleanup_s: float = 300
    """Time that a cluster's last pod has to clean Redis."""

    def lose_node(self, node: str, *pods: str) -> None:
        """Does to the pods of a node what Kubernetes does once its kubelet has been silent for a
        while: their containers' states stay, and so do the pods, until they are removed."""
        for name in pods:
            path = f"/api/v1/namespaces/raymill/pods/{name}"
            pod = self.api.get(path)
            assert pod is not None
            states = {"Ready": "False", "ContainersReady": "True"}
            pod["spec"]["nodeName"] = node
            pod["status"]["conditions"] = [
                {"type": kind, "status": status} for kind, status in states.items()
            ]
            self.api.put(path, pod, manager="kube-controller-manager")
            self.api.event(pod, "NodeNotReady", "Node is not ready", kind="Warning")

    def look(self) -> None:
        """Looks at everything, as often as it takes until nothing changes."""
        for _ in range(4):
            for kind, reconcile in (
                ("resourcequotas", self._quota_of_pods),
                ("rayservices", self._service),
                ("rayjobs", self._job),
                ("rayclusters", self._cluster),
                ("statefulsets", self._stateful_set),
            ):
                for name in self._names(self._path(kind)):
                    found = self.api.get(f"{self._path(kind)}/{name}")
                    if found is not None:
                        reconcile(found)
            for name in self._names(self._path("pods")):
                self._pod(name)

    def end_job(
        self, name: str, *, deployment: str = "Complete", status: str = "SUCCEEDED"
    ) -> None:
        """Ends a job; its cluster stays for a while."""
        job = self.api.get(f"{self._path('rayjobs')}/{name}")
        assert job is not None
        self._set_status(
            job, job["status"] | {"jobDeploymentStatus": deployment, "jobStatus": status}
        )

    def _refusal(self, cluster: Object) -> tuple[str, str] | None:
        """Returns the event by which KubeRay leaves a cluster as it is, without a status."""
        name = cluster["metadata"]["name"]
        if len(name) > _LONGEST_NAME:
            return (
                "InvalidRayClusterMetadata",
                f"RayCluster name should be no more than {_LONGEST_NAME} characters",
            )
        account = cluster["spec"]["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
        if self.api.get(f"{self._path('serviceaccounts')}/{account}") is None:
            said = f"Failed to reconcile RayCluster {self._full(cluster)}. ServiceAccount {account} is not found"
            return "AutoscalerServiceAccountNotFound", said
        return None

    def _cluster(self, cluster: Object) -> None:
        spec, metadata = cluster["spec"], cluster["metadata"]
        if "deletionTimestamp" not in metadata and (refusal := self._refusal(cluster)):
            if "status" not in cluster and not self._was_told(cluster, refusal[0]):
                self.api.event(cluster, *refusal, kind="Warning")
            return
        finalizers = (
            ["ray.io/gcs-ft-redis-cleanup-finalizer"] if "gcsFaultToleranceOptions" in spec else []
        )
        if finalizers and "finalizers" not in metadata:
            metadata["finalizers"] = finalizers
            cluster = self._rewrite(cluster)
            spec = cluster["spec"]
        pods = self._pods_of(cluster)
        if "deletionTimestamp" in metadata:
            self._end_cluster(cluster, pods)
            return
        status = {
            "desiredWorkerReplicas": sum(_desired(group) for group in spec["workerGroupSpecs"]),
            "minWorkerReplicas": sum(group["minReplicas"] for group in spec["workerGroupSpecs"]),
            "maxWorkerReplicas": sum(group["maxReplicas"] for group in spec["workerGroupSpecs"]),
            "observedGeneration": metadata["generation"],
        }
        if spec.get("suspend"):
            if pods:
                said = f"Deleted Pods for RayCluster {self._full(cluster)} due to suspension"
                self.api.event(cluster, "DeletedPod", said)
            for pod in pods:
                self.api.delete(f"{self._path('pods')}/{pod['metadata']['name']}")
            suspended = {"type": "RayClusterSuspended", "status": "True"}
            self._set_status(
                cluster,
                status | {"state": "suspended", "conditions": [_head_ready(None), suspended]},
            )
            return
        failure = self._make_pods(cluster, pods)
        pods = self._pods_of(cluster)
        head = next(
            (pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "head"), None
        )
        workers = [pod for pod in pods if pod is not head]
        suspended = {"type": "RayClusterSuspended", "status": "False"}
        status["conditions"] = [_head_ready(head), *([failure] if failure else []), suspended]
        status["readyWorkerReplicas"] = sum(
            pod["status"].get("phase") == "Running" for pod in workers
        )
        has_all = len(pods) == status["desiredWorkerReplicas"] + 1 and not failure
        # Stays what it was, also "suspended", until all pods run
        state = (cluster.get("status") or {}).get("state")
        state = (
            "ready"
            if has_all and all(pod["status"].get("phase") == "Running" for pod in pods)
            else state
        )
        self._set_status(cluster, status | ({"state": state} if state else {}))

    def _was_told(self, about: Object, reason: str) -> bool:
        events = self.api.list(self._path("events"))["items"]
        return any(
            (e["involvedObject"]["uid"], e["reason"]) == (about["metadata"]["uid"], reason)
            for e in events
        )

    def _end_cluster(self, cluster: Object, pods: list[Object]) -> None:
        """Ends the pods of a deleted cluster that has its state in Redis, and lets go of it once
        that is cleaned, or its time is over."""
        name = f"{cluster['metadata']['name']}-redis-cleanup"
        cleaning = [
            pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "redis-cleanup"
        ]
        for pod in pods:
            if pod not in cleaning:
                self.api.delete(f"{self._path('pods')}/{pod['metadata']['name']}")
        if not cleaning:
            job = self.api.put(
                f"{self._path('jobs')}/{name}",
                {"kind": "Job", "metadata": self._owned(cluster, name)},
            )
            self.api.event(
                cluster,
                "CreatedRedisCleanupJob",
                f"Created Redis cleanup Job {self.namespace}/{name}",
            )
            template = cluster["spec"]["headGroupSpec"]["template"]
            labels = template["metadata"]["labels"] | {
                "ray.io/is-ray-node": "yes",
                "ray.io/group": "headgroup",
            }
            labels |= {
                "ray.io/cluster": cluster["metadata"]["name"],
                "ray.io/node-type": "redis-cleanup",
            }
            self._make_pod(job, f"{name}-{secrets.token_hex(3)[:5]}", labels, template["spec"])
        elif (
            cleaning[0]["status"].get("phase") == "Succeeded"
            or _seconds_since(cleaning[0]["metadata"]["creationTimestamp"]) > self.cleanup_s
        ):
            cluster["metadata"]["finalizers"] = []
            self.api.put(f"{self._path('rayclusters')}/{cluster['metadata']['name']}", cluster)

    def _make_pods(self, cluster: Object, pods: list[Object]) -> Object | None:
        """Makes missing pods; returns the condition that says why it could not. Surplus ones are
        removed if the head's autoscaler is there, which names them; KubeRay by itself removes
        none."""
        full = self._full(cluster)
        autoscales = any(
            pod["metadata"]["labels"]["ray.io/node-type"] == "head"
            and pod["status"].get("phase") == "Running"
            for pod in pods
        )
        groups = [("head", "headgroup", cluster["spec"]["headGroupSpec"], 1)]
        groups += [
            ("worker", g["groupName"], g, _desired(g)) for g in cluster["spec"]["workerGroupSpecs"]
        ]
        for kind, name, group, desired in groups:
            mine = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/group"] == name]
            for pod in mine[desired:] if autoscales else []:
                self.api.delete(f"{self._path('pods')}/{pod['metadata']['name']}")
                self.api.event(cluster, "DeletedWorkerPod", f"Deleted worker Pod {self._full(pod)}")
            for _ in range(desired - len(mine)):
                middle = "head" if kind == "head" else f"{name}-worker"
                pod_name = f"{cluster['metadata']['name']}-{middle}-{secrets.token_hex(3)}"
                used, most = len(self._names(self._path("pods"))), self._quota()
                if used >= most:
                    refused = f'pods "{pod_name}" is forbidden: exceeded quota: raymill, requested: pods=1, used: pods={used}, limited: pods={most}'
                    said = f"Failed to create {kind} Pod for the cluster {full}, {refused}"
                    self.api.event(
                        cluster, f"FailedToCreate{kind.capitalize()}Pod", said, kind="Warning"
                    )
                    reason = f"FailedCreate{kind.capitalize()}Pod"
                    message = f"{reason}\n{refused}"  # as errors that Go joins
                    return {
                        "type": "ReplicaFailure",
                        "status": "True",
                        "reason": reason,
                        "message": message,
                    }
                labels = group["template"].get("metadata", {}).get("labels", {})
                labels = labels | {
                    "ray.io/cluster": cluster["metadata"]["name"],
                    "ray.io/is-ray-node": "yes",
                }
                labels |= {"ray.io/node-type": kind, "ray.io/group": name}
                self._make_pod(cluster, pod_name, labels, group["template"]["spec"])
                said = f"Created {kind} Pod {self.namespace}/{pod_name}"
                self.api.event(cluster, f"Created{kind.capitalize()}Pod", said)
        return None

    def _job(self, job: Object) -> None:
        status, name = job.get("status") or {}, job["metadata"]["name"]
        state, clusters = status.get("jobDeploymentStatus", ""), self._path("rayclusters")
        if state in _ENDED:
            return
        if job["spec"].get("suspend"):
            if status.get("rayClusterName"):
                self.api.delete(f"{clusters}/{status['rayClusterName']}")
                self.api.delete(f"{self._path('jobs')}/{name}")
                job = self._rewrite(job)
            self._set_status(job, {"jobDeploymentStatus": "Suspended"})
            return
        if not status.get("rayClusterName"):
            status = {
                "jobDeploymentStatus": "Initializing",
                "rayClusterName": f"{name}-{secrets.token_hex(3)[:5]}",
            }
            status["startTime"] = now()
            self._make_cluster(job, status["rayClusterName"], {})
            said = f"Created RayCluster {self.namespace}/{status['rayClusterName']}"
            self.api.event(job, "CreatedRayCluster", said)
        cluster = self.api.get(f"{clusters}/{status['rayClusterName']}")
        if _seconds_since(status["startTime"]) > job["spec"].get("activeDeadlineSeconds", math.inf):
            self._set_status(
                job, status | {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}
            )
            return
        if (
            state == "Initializing"
            and cluster
            and (cluster.get("status") or {}).get("state") == "ready"
        ):
            path = f"{self._path('jobs')}/{name}"
            submitter = self.api.put(path, {"kind": "Job", "metadata": self._owned(job, name)})
            self.api.event(
                job, "CreatedRayJobSubmitter", f"Created Kubernetes Job {self.namespace}/{name}"
            )
            template = job["spec"]["submitterPodTemplate"]
            labels = template["metadata"]["labels"] | {
                "job-name": name,
                "batch.kubernetes.io/job-name": name,
            }
            self._make_pod(
                submitter, f"{name}-{secrets.token_hex(3)[:5]}", labels, template["spec"]
            )
            status |= {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}
        self._set_status(job, status)

    def _service(self, service: Object) -> None:
        """Keeps a new cluster pending until its head is up. Of an active one it compares only the
        hash, which leaves out the bounds of its groups."""
        status, metadata = service.get("status") or {}, service["metadata"]
        active = (status.get("activeServiceStatus") or {}).get("rayClusterName")
        pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName")
        clusters = self._path("rayclusters")
        is_suspending = any(
            c["type"] == "Suspending" and c["status"] == "True"
            for c in status.get("conditions", [])
        )
        # It is gone through with, even if it is resumed meanwhile
        if service["spec"].get("suspend") or is_suspending:
            for name in filter(None, (active, pending)):
                found = self.api.get(f"{clusters}/{name}")
                if found and "deletionTimestamp" not in found["metadata"]:
                    self.api.delete(f"{clusters}/{name}")
                    said = f"Deleted the RayCluster {self.namespace}/{name} during suspend"
                    self.api.event(service, "DeletedRayCluster", said)
            are_left = any(
                self.api.get(f"{clusters}/{name}") for name in filter(None, (active, pending))
            )
            kept = {
                key: status[key]
                for key in ("activeServiceStatus", "pendingServiceStatus")
                if key in status
            }
            condition = {"type": "Suspending" if are_left else "Suspended", "status": "True"}
            self._set_status(service, (kept if are_left else {}) | {"conditions": [condition]})
            return
        goal = cluster_spec(service)
        if active and not pending:
            cluster = self.api.get(f"{clusters}/{active}")
            assert cluster is not None
            before = cluster["metadata"]["annotations"]
            kept = int(before[_NUM_GROUPS])
            if before[_HASH] == _hash(goal, len(goal["workerGroupSpecs"])):
                return
            # Groups behind the known ones: the one change that it takes over
            if before[_HASH] == _hash(goal, kept):
                cluster["spec"] = copy.deepcopy(goal)
                cluster["metadata"]["annotations"] |= _marks(goal)
                self.api.put(f"{clusters}/{active}", cluster)
                return
        if (not pending and not active) or not pending:
            pending = f"{metadata['name']}-{secrets.token_hex(3)[:5]}"
            self._make_cluster(service, pending, _marks(goal))
            said = f"Created the RayCluster {self.namespace}/{pending}"
            self.api.event(service, "CreatedRayCluster", said)
            said = f'Failed to create the RayCluster {self.namespace}/{pending}: rayclusters.ray.io "{pending}" already exists'
            # It races with its own cache
            self.api.event(service, "FailedToCreateRayCluster", said, kind="Warning")
        cluster = self.api.get(f"{clusters}/{pending}")
        status = {"pendingServiceStatus": {"rayClusterName": pending}}
        status |= {"activeServiceStatus": {"rayClusterName": active}} if active else {}
        ready = {"type": "Ready", "status": "True" if active else "False", "reason": "Initializing"}
        if cluster and (cluster.get("status") or {}).get("state") == "ready":
            if active:
                self.api.delete(f"{clusters}/{active}")
            status = {"activeServiceStatus": {"rayClusterName": pending}}
            ready = {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}
        self._set_status(service, status | {"conditions": [ready]})

    def _stateful_set(self, owner: Object) -> None:
        """Acts as the controller, with a single pod."""
        name = f"{owner['metadata']['name']}-0"
        if self.api.get(f"{self._path('pods')}/{name}") is None:
            spec = copy.deepcopy(owner["spec"]["template"]["spec"])
            for template in owner["spec"].get("volumeClaimTemplates", []):
                claim = f"{template['metadata']['name']}-{name}"
                made = {
                    "kind": "PersistentVolumeClaim",
                    "metadata": {"name": claim, "namespace": self.namespace},
                }
                made = self.api.put(f"{self._path('persistentvolumeclaims')}/{claim}", made)
                if storage_class := template["spec"].get("storageClassName"):
                    said = f'storageclass.storage.k8s.io "{storage_class}" not found'
                    self.api.event(made, "ProvisioningFailed", said, kind="Warning")
                spec["volumes"].append(
                    {"name": "data", "persistentVolumeClaim": {"claimName": claim}}
                )
            self._make_pod(owner, name, owner["spec"]["template"]["metadata"]["labels"], spec)

    def _pod(self, name: str) -> None:
        path = f"{self._path('pods')}/{name}"
        pod = self.api.get(path)
        assert pod is not None
        cleans = pod["metadata"]["labels"].get("ray.io/node-type") == "redis-cleanup"
        status, events = next(
            (fate for fits, fate in self.fates if fits(pod)), _SUCCEEDED if cleans else RUNNING
        )
        if pod["status"] != status:
            self.api.put(path, pod | {"status": status}, manager="kubelet")
            for kind, reason, message in events:
                self.api.event(pod, reason, message, kind=kind)

    def _make_pod(self, owner: Object, name: str, labels: dict[str, str], spec: Object) -> None:
        metadata = self._owned(owner, name) | {"labels": labels}
        pod = {"kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": "Pending"}}
        self.api.put(f"{self._path('pods')}/{name}", pod)

    def _make_cluster(self, owner: Object, name: str, annotations: dict[str, str]) -> None:
        before = owner["metadata"]
        metadata = self._owned(owner, name) | {"labels": before.get("labels", {})}
        metadata["annotations"] = before.get("annotations", {}) | annotations
        spec = copy.deepcopy(cluster_spec(owner))
        cluster = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": metadata,
            "spec": spec,
        }
        self._rewrite(cluster)

    def _rewrite(self, value: Object) -> Object:
        """Updates the whole object from Go's structs, in which a group always has its
        `scaleStrategy`."""
        cluster = cluster_spec(value)
        cluster["workerGroupSpecs"] = [
            {"scaleStrategy": {}} | group for group in cluster["workerGroupSpecs"]
        ]
        return self.api.put(
            f"{self._path(value['kind'].lower() + 's')}/{value['metadata']['name']}", value
        )

    def _set_status(self, value: Object, status: Object) -> None:
        path = f"{self._path(value['kind'].lower() + 's')}/{value['metadata']['name']}"
        found = self.api.get(path)
        if found is not None and found.get("status") != status:
            self.api.put(path, found | {"status": status})

    def _pods_of(self, cluster: Object) -> list[Object]:
        selector = f"ray.io/cluster={cluster['metadata']['name']}"
        items: list[Object] = self.api.list(self._path("pods"), selector)["items"]
        return items

    def _owned(self, owner: Object, name: str) -> Object:
        reference = {
            "apiVersion": owner.get("apiVersion", "batch/v1"),
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        return {"name": name, "namespace": self.namespace, "ownerReferences": [reference]}

    def _names(self, collection: str) -> list[str]:
        return [item["metadata"]["name"] for item in self.api.list(collection)["items"]]

    def _quota_of_pods(self, quota: Object) -> None:
        """Acts as the controller, without which a quota's numbers are not in force."""
        used = {"pods": str(len(self._names(self._path("pods"))))}
        self._set_status(quota, {"hard": quota["spec"]["hard"], "used": used})

    def _quota(self) -> int:
        """Returns how many pods there may be."""
        quota = self.api.get(f"{self._path('resourcequotas')}/raymill")
        return int(quota["status"]["hard"]["pods"]) if quota else 999

    def _full(self, value: Object) -> str:
        return f"{self.namespace}/{value['metadata']['name']}"

    def _path(self, plural: str) -> str:
        groups = {"statefulsets": "/apis/apps/v1", "jobs": "/apis/batch/v1"}
        root = groups.get(plural, "/apis/ray.io/v1" if plural.startswith("ray") else "/api/v1")
        return f"{root}/namespaces/{self.namespace}/{plural}"


def _seconds_since(text: str) -> float:
    then = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def _desired(group: Object) -> int:
    """Returns how many pods a group should have: KubeRay keeps `replicas` within the bounds without
    writing it."""
    if group.get("suspend"):
        return 0
    return int(
        min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])
        * group["numOfHosts"]
    )


def _head_ready(head: Object | None) -> Object:
    if head is None:
        return {
            "type": "HeadPodReady",
            "status": "False",
            "reason": "HeadPodNotFound",
            "message": "Head Pod not found",
        }
    ready = next((c for c in head["status"].get("conditions", []) if c["type"] == "Ready"), None)
    if ready is None:
        return {"type": "HeadPodReady", "status": "False", "reason": "Unknown", "message": ""}
    return {"reason": "HeadPodRunningAndReady", "message": ""} | ready | {"type": "HeadPodReady"}


def _hash(cluster: Object, num_groups: int) -> str:
    groups = [
        {key: item for key, item in group.items() if key not in _NOT_HASHED}
        for group in cluster["workerGroupSpecs"][:num_groups]
    ]
    return json.dumps(cluster | {"workerGroupSpecs": groups}, sort_keys=True)


def _marks(cluster: Object) -> dict[str, str]:
    number = len(cluster["workerGroupSpecs"])
    return {_HASH: _hash(cluster, number), _NUM_GROUPS: str(number)}
