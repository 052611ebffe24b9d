"""Rules on manifests that the CRDs allow but KubeRay 1.7 refuses, or accepts and never gets
running."""

import re

import yaml

from tests.k8s.manifests import (
    CLUSTER_KINDS,
    Manifest,
    cluster_spec,
    name_of,
    of_kind,
    pods,
    quantity,
    ray_pods,
)

_LONGEST_NAME = 47  # of Ray's kinds: pod names grow from it
# A group that idles out sooner than a dead node is noticed makes its replacements flap
_NODE_DEATH_S = 60
_MIN_VERSION_FOR_TOKENS = (2, 52)
_MOST_QUEUED_GROUPS = 7
_INSTEAD_OF_OPTIONS = {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}
_NEAR = "kueue.x-k8s.io/podset-preferred-topology"


def name_problems(objects: list[Manifest]) -> list[str]:
    return [
        f"{name_of(manifest)}: a name is a DNS label of at most {_LONGEST_NAME} characters that begins with a letter"
        for manifest in of_kind(objects, *CLUSTER_KINDS)
        if not re.fullmatch(
            rf"[a-z]([a-z0-9-]{{0,{_LONGEST_NAME - 2}}}[a-z0-9])?", manifest["metadata"]["name"]
        )
    ]


def autoscaler_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        name, cluster = name_of(manifest), cluster_spec(manifest)
        options, groups = cluster.get("autoscalerOptions", {}), cluster["workerGroupSpecs"]
        if not cluster.get("enableInTreeAutoscaling") or options.get("version") != "v2":
            problems.append(f"{name}: the autoscaler must be on, version v2")
        start = " ".join(options.get("args", []))
        if "trap" not in start or "$KUBERAY_GEN_AUTOSCALER_START_CMD" not in start:
            problems.append(
                f"{name}: the autoscaler must be started by a shell that passes SIGTERM on"
            )
        idle = [("autoscalerOptions", options), *((group["groupName"], group) for group in groups)]
        for where, spec in idle:
            if spec.get("idleTimeoutSeconds", _NODE_DEATH_S) < _NODE_DEATH_S:
                problems.append(f"{name}: {where}: idleTimeoutSeconds is under {_NODE_DEATH_S}")
        for group in groups:
            if group.get("suspend"):
                problems.append(
                    f"{name}: {group['groupName']}: a group cannot be suspended beside the autoscaler"
                )
            if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
                problems.append(f"{name}: {group['groupName']}: minReplicas exceeds maxReplicas")
        environment = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])
        if any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in environment):
            problems.append(
                f"{name}: RAY_enable_autoscaler_v2 stands beside autoscalerOptions.version"
            )
    problems += [
        f"{pod.where}: restartPolicy must be Never or unset with autoscaler v2"
        for pod in pods(objects)
        if pod.spec.get("restartPolicy", "Never") != "Never"
    ]
    return problems


def cluster_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        name, cluster = name_of(manifest), cluster_spec(manifest)
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token":
            problems.append(
                f"{name}: authOptions.mode is not token: an open Ray port is remote code execution"
            )
        if auth.get("enableK8sTokenAuth") and manifest["kind"] != "RayCluster":
            problems.append(f"{name}: enableK8sTokenAuth is for a RayCluster only")
        if (
            tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
            < _MIN_VERSION_FOR_TOKENS
        ):
            problems.append(
                f"{name}: token auth needs rayVersion 2.52 or later, not {cluster['rayVersion']}"
            )
        if "upgradeStrategy" in cluster and manifest["kind"] != "RayCluster":
            problems.append(f"{name}: upgradeStrategy is for a RayCluster that nobody owns")
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            params, where = group["rayStartParams"], group.get("groupName", "head")
            if group.get("resources") and params.keys() & {
                "num-cpus",
                "num-gpus",
                "memory",
                "resources",
            }:
                problems.append(
                    f"{name}: {where}: resources stand in rayStartParams and in resources"
                )
            if "labels" in params:
                problems.append(
                    f"{name}: {where}: labels belong beside rayStartParams, not into it"
                )
            problems += [
                f"{name}: {where}: rayStartParams.{k} is no text"
                for k, v in params.items()
                if type(v) is not str
            ]
    return problems


def job_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for manifest in of_kind(objects, "RayJob"):
        name, spec = name_of(manifest), manifest["spec"]
        shuts_down, strategy = (
            spec.get("shutdownAfterJobFinishes", False),
            spec.get("deletionStrategy", {}),
        )
        if not shuts_down and not strategy:
            problems.append(f"{name}: nothing ends its cluster when the job has finished")
        policies = [
            *strategy.get("deletionRules", []),
            strategy.get("onSuccess", {}),
            strategy.get("onFailure", {}),
        ]
        if any(rule.get("policy") == "DeleteWorkers" for rule in policies):
            problems.append(f"{name}: DeleteWorkers is refused beside the autoscaler")
        if shuts_down and strategy.get("deletionRules"):
            problems.append(
                f"{name}: deletionRules and shutdownAfterJobFinishes exclude each other"
            )
        if spec.get("suspend") and (not shuts_down or spec.get("clusterSelector")):
            problems.append(
                f"{name}: suspend needs shutdownAfterJobFinishes and no clusterSelector"
            )
        if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
            problems.append(f"{name}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
            problems.append(
                f"{name}: activeDeadlineSeconds must be positive and backoffLimit not negative"
            )
    return problems


def service_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for manifest in of_kind(objects, "RayService"):
        name, spec = name_of(manifest), manifest["spec"]
        if (
            cluster_spec(manifest)["headGroupSpec"]
            .get("headService", {})
            .get("metadata", {})
            .get("name")
        ):
            problems.append(f"{name}: the head service's name is the operator's")
        upgrade = spec.get("upgradeStrategy", {})
        if upgrade.get("type", "NewCluster") not in (
            "NewCluster",
            "None",
            "NewClusterWithIncrementalUpgrade",
        ):
            problems.append(f"{name}: upgradeStrategy.type {upgrade['type']} is unknown")
        if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
            options = upgrade.get("clusterUpgradeOptions", {})
            if not options.get("gatewayClassName"):
                problems.append(f"{name}: an incremental upgrade needs gatewayClassName")
            if options.get("stepSizePercent", 101) > options.get("maxSurgePercent", 100):
                problems.append(f"{name}: stepSizePercent exceeds maxSurgePercent")
        if not isinstance(yaml.safe_load(spec["serveConfigV2"]), dict):
            problems.append(f"{name}: serveConfigV2 is no YAML mapping")
    return problems


def memory_problems(objects: list[Manifest]) -> list[str]:
    """Ray's object store takes 30% of the memory, and goes to disk when /dev/shm has less."""
    problems = []
    for pod in ray_pods(objects):
        (shm,) = (volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm")
        size, memory = (
            quantity(shm["sizeLimit"]),
            quantity(pod.container["resources"]["limits"]["memory"]),
        )
        if not 0.3 * memory <= size <= memory:
            problems.append(
                f"{pod.where}: /dev/shm of {shm['sizeLimit']} is not between 30% and all of the memory"
            )
    return problems


def recovery_problems(objects: list[Manifest]) -> list[str]:
    """A cluster that outlives its head keeps its state in Redis, with a password from a Secret, set
    in one place."""
    problems = []
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        name, cluster = name_of(manifest), cluster_spec(manifest)
        options = cluster.get("gcsFaultToleranceOptions")
        if options is None:
            if manifest["kind"] != "RayJob":  # which is tried again, on a new cluster
                problems.append(
                    f"{name}: no gcsFaultToleranceOptions: the cluster ends with its head"
                )
            continue
        services = {
            f"{o['metadata']['name']}:{o['spec']['ports'][0]['port']}"
            for o in of_kind(objects, "Service")
        }
        address = options.get("redisAddress", "")
        if (
            options.get("backend", "redis") == "redis"
            and address.removeprefix("rediss://") not in services
        ):
            problems.append(f"{name}: no service at redisAddress {address}")
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        knows_authority = "RAY_REDIS_CA_CERT" in {
            variable["name"] for variable in head.get("env", [])
        }
        if len({address.startswith("rediss://"), _redis_speaks_tls(objects), knows_authority}) > 1:
            problems.append(
                f"{name}: TLS is not agreed upon between redisAddress, the head and Redis"
            )
        if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
            problems.append(f"{name}: redisPassword must come from a Secret")
        for key in _INSTEAD_OF_OPTIONS & manifest["metadata"].get("annotations", {}).keys():
            problems.append(f"{name}: {key} stands beside gcsFaultToleranceOptions")
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            own = {
                variable["name"]
                for variable in group["template"]["spec"]["containers"][0].get("env", [])
            }
            given = own | group["rayStartParams"].keys()
            if given & {
                "RAY_REDIS_ADDRESS",
                "REDIS_USERNAME",
                "REDIS_PASSWORD",
                "redis-username",
                "redis-password",
            }:
                problems.append(f"{name}: Redis stands in a pod beside gcsFaultToleranceOptions")
    return problems


def _redis_speaks_tls(objects: list[Manifest]) -> bool:
    (server,) = (pod for pod in pods(objects) if pod.role == "redis")
    return "tls-port" in server.container["args"][0]


def queue_problems(objects: list[Manifest]) -> list[str]:
    """A queued job has what Kueue asks for, and the queue covers each resource that its pods
    request."""
    problems = []
    covered = {
        resource
        for queue in of_kind(objects, "ClusterQueue")
        for group in queue["spec"]["resourceGroups"]
        for resource in group["coveredResources"]
    }
    topologies = {o["metadata"]["name"] for o in of_kind(objects, "Topology")}
    queues = {queue["metadata"]["name"] for queue in of_kind(objects, "LocalQueue")}
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        name, metadata = name_of(manifest), manifest["metadata"]
        queue = metadata["labels"].get("kueue.x-k8s.io/queue-name")
        if queue is None:
            if manifest["spec"].get("suspend"):
                problems.append(f"{name}: is suspended, and no queue would start it")
            continue
        if queue not in queues:
            problems.append(f"{name}: there is no LocalQueue {queue}")
        if metadata.get("annotations", {}).get("kueue.x-k8s.io/elastic-job") != "true":
            problems.append(
                f"{name}: Kueue refuses a cluster that scales, unless it is an elastic-job"
            )
        if len(cluster_spec(manifest)["workerGroupSpecs"]) > _MOST_QUEUED_GROUPS:
            problems.append(f"{name}: Kueue takes at most {_MOST_QUEUED_GROUPS} worker groups")
        if len(
            {
                o["spec"]["topologyName"]
                for o in of_kind(objects, "ResourceFlavor")
                if "topologyName" in o.get("spec", {})
            }
            - topologies
        ):
            problems.append(f"{name}: there is no Topology of its flavor's name")
        levels = {
            level["nodeLabel"]
            for o in of_kind(objects, "Topology")
            for level in o["spec"]["levels"]
        }
        near = {
            pod.template["metadata"].get("annotations", {}).get(_NEAR) for pod in pods([manifest])
        } - {None}
        problems += [f"{name}: {label} is no level of a Topology" for label in near - levels]
        requested = {
            resource
            for pod in pods([manifest])
            for container in pod.spec["containers"]
            for resource in container["resources"]["requests"]
        }
        problems += [
            f"{name}: the ClusterQueue does not cover {resource}"
            for resource in requested - covered
        ]
    return problems


RULES = (
    name_problems,
    autoscaler_problems,
    cluster_problems,
    job_problems,
    service_problems,
    memory_problems,
    recovery_problems,
    queue_problems,
)
