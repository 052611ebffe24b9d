"""Rules on the life of pods: how a pod ends, what a node drain may evict, priorities, the quota,
spot nodes."""

from tests.k8s.manifests import (
    CLUSTER_KINDS,
    Manifest,
    Pod,
    cluster_spec,
    find,
    name_of,
    of_kind,
    pods,
    quantity,
    ray_pods,
)

_SPOT = "raymill/capacity"  # key of the label and the taint of spot nodes
_SPOT_NOTICE_S = 25  # the least that a cloud gives
_SPOT_WAIT_S = 900
_STAYS = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
_PRIORITIES = {"submitter": "raymill-batch", "head": "raymill-head", "redis": "raymill-head"}


def _drain_s(pod: Pod, objects: list[Manifest]) -> float:
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    own = {variable["name"]: variable.get("value") for variable in pod.container.get("env", [])}
    return float(own.get(name) or find(objects, "ConfigMap/ray-environment")["data"][name])


def termination_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for pod in ray_pods(objects):
        grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        command = (
            pod.container.get("lifecycle", {})
            .get("preStop", {})
            .get("exec", {})
            .get("command", ["sleep", "0"])
        )
        drain_s = _drain_s(pod, objects)
        comes_back = pod.role == "head" and pod.component in ("completions", "shared")
        if comes_back and drain_s > 0:
            problems.append(f"{pod.where}: its successor waits {drain_s:.0f} s for it to drain")
        needed_s = float(command[1]) + drain_s
        if grace_s < 60 or grace_s <= needed_s:
            problems.append(
                f"{pod.where}: {grace_s} s of grace, but at least 60 and over {needed_s:.0f} are needed"
            )
    return problems


def disruption_problems(objects: list[Manifest]) -> list[str]:
    """A PodDisruptionBudget over pods without a scale subresource takes an integer minAvailable
    only.

    It lets a drain end: its pods are more than it keeps, or they end by themselves.
    """
    problems = []
    budgets = of_kind(objects, "PodDisruptionBudget")
    for budget in budgets:
        if (
            type(budget["spec"].get("minAvailable")) is not int
            or "maxUnavailable" in budget["spec"]
        ):
            problems.append(f"{name_of(budget)}: must say minAvailable, as an integer")
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        component = manifest["metadata"]["labels"].get("app.kubernetes.io/component")
        lowest = sum(group["minReplicas"] for group in cluster_spec(manifest)["workerGroupSpecs"])
        for role, number in (("head", 1), ("worker", lowest)):
            labels = {"app.kubernetes.io/component": component, "ray.io/node-type": role}.items()
            kept = [
                o["spec"].get("minAvailable", 0)
                for o in budgets
                if o["spec"]["selector"]["matchLabels"].items() <= labels
            ]
            ends = role == "head" and manifest["kind"] == "RayJob"
            if (
                kept
                and not ends
                and not any(type(least) is int and least < number for least in kept)
            ):
                problems.append(
                    f"{name_of(manifest)}: its {role}'s PodDisruptionBudget lets no node be drained"
                )
            if not kept and component == "completions" and role == "worker" and lowest > 1:
                problems.append(
                    f"{name_of(manifest)}: no PodDisruptionBudget keeps one of its workers"
                )
    return problems


def spread_problems(objects: list[Manifest]) -> list[str]:
    """Replicas stand on several nodes, where the pods of the cluster before an upgrade do not
    count."""
    problems = []
    for pod in pods(objects):
        if (pod.component, pod.role) != ("completions", "worker"):
            continue
        labels = pod.template["metadata"]["labels"] | {"ray.io/node-type": "worker"}
        spread = [
            it
            for it in pod.spec.get("topologySpreadConstraints", [])
            if it["topologyKey"] == "kubernetes.io/hostname"
            and it["labelSelector"]["matchLabels"].items() <= labels.items()
        ]
        if not spread:
            problems.append(f"{pod.where}: all replicas may stand on one node")
        elif any(it.get("matchLabelKeys") != ["ray.io/cluster"] for it in spread):
            problems.append(f"{pod.where}: is spread beside the pods of another cluster")
    return problems


def stay_problems(objects: list[Manifest]) -> list[str]:
    """Node autoscalers leave what cannot move without a loss; trainers save and end."""
    problems = []
    for pod in pods(objects):
        told = _STAYS.items() <= pod.template["metadata"].get("annotations", {}).items()
        if told is not (pod.role != "worker"):
            problems.append(
                f"{pod.where}: a node autoscaler {'cannot move it' if told else 'would move it'}"
            )
    return problems


def after_the_end_problems(objects: list[Manifest]) -> list[str]:
    """A job that has ended keeps no pods."""
    return [
        f"{name_of(job)}: its pods stay for {job['spec']['ttlSecondsAfterFinished']} s after its end"
        for job in of_kind(objects, "RayJob")
        if job["spec"].get("ttlSecondsAfterFinished", 0) > 0
    ]


def priority_problems(objects: list[Manifest]) -> list[str]:
    """Heads stay longest, then the endpoint; resumable work neither stays nor evicts others."""
    problems = []
    classes = {o["metadata"]["name"]: o for o in of_kind(objects, "PriorityClass")}
    if (
        not classes["raymill-head"]["value"]
        > classes["raymill-serving"]["value"]
        > classes["raymill-batch"]["value"]
    ):
        problems.append("the priorities are not in the order head, serving, batch")
    if classes["raymill-batch"].get("preemptionPolicy") != "Never":
        problems.append("PriorityClass/raymill-batch: a job would take the room of others")
    problems += [
        f"{name_of(o)}: is every pod's" for o in classes.values() if o.get("globalDefault")
    ]
    for pod in pods(objects):
        serves = pod.template["metadata"]["labels"]["app.kubernetes.io/component"] == "completions"
        expected = _PRIORITIES.get(pod.role, "raymill-serving" if serves else "raymill-batch")
        if pod.spec.get("priorityClassName") != expected:
            problems.append(f"{pod.where}: its priority must be {expected}")
    return problems


def quota_problems(objects: list[Manifest]) -> list[str]:
    """The namespace is bounded, opens no port to the outside, and has room for each cluster at its
    largest."""
    (quota,) = of_kind(objects, "ResourceQuota")
    hard = quota["spec"]["hard"]
    problems = [
        f"{name_of(quota)}: {what} must be 0"
        for what in ("services.loadbalancers", "services.nodeports")
        if hard.get(what) != "0"
    ]
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        cluster = cluster_spec(manifest)
        groups = [
            (cluster["headGroupSpec"], 1),
            *((group, group["maxReplicas"]) for group in cluster["workerGroupSpecs"]),
        ]
        for resource in ("cpu", "memory", "nvidia.com/gpu"):
            wanted = sum(
                number
                * quantity(
                    group["template"]["spec"]["containers"][0]["resources"]["requests"].get(
                        resource, "0"
                    )
                )
                for group, number in groups
            )
            if wanted > quantity(hard.get(f"requests.{resource}", "0")):
                problems.append(
                    f"{name_of(manifest)}: at its largest it exceeds the quota of {resource}"
                )
    return problems


def spot_problems(objects: list[Manifest]) -> list[str]:
    """Only resumable work is on spot nodes, and it drains within their notice."""
    problems = []
    for pod in pods(objects):
        tolerates = any(t["key"] == _SPOT for t in pod.spec.get("tolerations", []))
        if not tolerates:
            continue
        if pod.spec.get("nodeSelector", {}).get(_SPOT) != "spot":
            problems.append(f"{pod.where}: tolerates spot nodes, but does not ask for one")
        if pod.spec.get("priorityClassName") != "raymill-batch" or pod.role != "worker":
            problems.append(f"{pod.where}: must not stand on a spot node")
        elif _drain_s(pod, objects) >= _SPOT_NOTICE_S:
            problems.append(f"{pod.where}: drains longer than the {_SPOT_NOTICE_S} s of notice")
    return problems + _fallback_problems(objects)


def _fallback_problems(objects: list[Manifest]) -> list[str]:
    """If no spot node comes, an equal group on demand takes over, after the autoscaler's time
    limit."""
    problems = []
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        cluster, name = cluster_spec(manifest), name_of(manifest)
        groups = cluster["workerGroupSpecs"]
        spot = [g for g in groups if _SPOT in g["template"]["spec"].get("nodeSelector", {})]
        others = [g for g in groups if g not in spot]
        for group in spot:
            resources = group["template"]["spec"]["containers"][0]["resources"]
            equal = [
                g
                for g in others
                if g["template"]["spec"]["containers"][0]["resources"] == resources
            ]
            if not any(g.get("priority", 0) < group.get("priority", 0) for g in equal):
                problems.append(
                    f"{name}: group {group['groupName']} has no group on demand behind it"
                )
            told = {v["name"]: v["value"] for v in cluster["autoscalerOptions"].get("env", [])}
            if (
                float(told.get("RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", 3600))
                > _SPOT_WAIT_S
            ):
                problems.append(f"{name}: waits over {_SPOT_WAIT_S} s for spot nodes")
    return problems


RULES = (
    termination_problems,
    disruption_problems,
    spread_problems,
    stay_problems,
    after_the_end_problems,
    priority_problems,
    quota_problems,
    spot_problems,
)
