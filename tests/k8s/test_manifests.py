"""Every object of every kustomization fits the schemas, the operator's rules, the checklist and the
code it starts."""

import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from ray import serve

from serving.app import build_app
from tests.k8s import life_rules, network_rules, operator_rules, run_rules, security_rules
from tests.k8s.manifests import (
    CLUSTER_KINDS,
    COMPONENTS,
    CRDS,
    K8S,
    KUSTOMIZATIONS,
    Manifest,
    Pod,
    Rule,
    cluster_spec,
    find,
    name_of,
    of_kind,
    pods,
    quantity,
    ray_pods,
    render,
    render_into,
)
from tests.k8s.schema_rules import builtin_problems, crd_problems
from tests.time_limits import limit_s
from tests.waiting import wait_until

QUEUE = "kueue.x-k8s.io/queue-name"
RULES = (
    *operator_rules.RULES,
    *security_rules.RULES,
    *life_rules.RULES,
    *network_rules.RULES,
    *run_rules.RULES,
)

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no KubeRay CRDs at {CRDS}")


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_obeys(rule: Rule, kustomization: str) -> None:
    assert rule(render(kustomization)) == []


@needs_crds
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_ray_kinds_fit_their_crds(kustomization: str) -> None:
    assert crd_problems(render(kustomization)) == []


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_builtin_kinds_and_pods_fit_their_schemas(kustomization: str) -> None:
    assert builtin_problems(render(kustomization)) == []


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_holds_all_that_runs(kustomization: str) -> None:
    objects = render(kustomization)
    names = [name_of(manifest) for manifest in of_kind(objects, *CLUSTER_KINDS)]
    jobs = ["RayJob/evaluate", "RayJob/pretrain", "RayJob/tokenize"]
    assert sorted(names) == ["RayCluster/shared", *jobs, "RayService/completions"]
    second_groups = "spot" in kustomization
    # A head and a group each, the jobs' submitters, and Redis
    assert len(list(pods(objects))) == 14 + second_groups


def test_gpu_trainers_go_from_none_to_the_runs_workers() -> None:
    objects = render("overlays/gpu")
    (group,) = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["minReplicas"], group["maxReplicas"], limits["nvidia.com/gpu"]) == (0, 8, "1")
    assert run_rules.run_config(objects).scaling.max_workers == 8


def test_a_whole_node_is_one_pod_with_a_worker_for_each_gpu() -> None:
    objects = render("overlays/gpu-node")
    (group,) = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    scaling = run_rules.run_config(objects).scaling
    assert (group["minReplicas"], group["maxReplicas"], limits["nvidia.com/gpu"]) == (0, 2, "8")
    assert (scaling.max_workers, int(limits["cpu"])) == (16, 8 * scaling.threads_per_worker)


def test_gpu_replicas_go_from_one_to_four_by_vllm() -> None:
    objects = render("overlays/gpu-serving")
    service = find(objects, "RayService/completions")
    (group,) = cluster_spec(service)["workerGroupSpecs"]
    config = run_rules.serve_config(service)
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    assert (config.replicas.min_replicas, config.replicas.max_replicas) == (1, 4)
    assert config.engine.runs_vllm and config.engine.device == "cuda"


@pytest.mark.parametrize(
    ("kustomization", "label"),
    [
        ("overlays/gpu", "nvidia.com/gpu.product"),
        ("overlays/eks", "eks.amazonaws.com/instance-gpu-name"),
        ("overlays/gke", "cloud.google.com/gke-accelerator"),
    ],
)
def test_gpu_pods_name_their_gpu_as_the_cloud_does(kustomization: str, label: str) -> None:
    selectors = [
        pod.spec["nodeSelector"].keys() for pod in ray_pods(render(kustomization)) if pod.gpus
    ]
    assert selectors
    assert all(keys == {"kubernetes.io/arch", label} for keys in selectors)


def test_the_node_pools_of_eks_are_those_that_its_pods_ask_for() -> None:
    pools = {
        name_of(o): o["spec"]["template"] for o in render("nodes/eks") if o["kind"] == "NodePool"
    }
    on_demand, spot = pools["NodePool/gpu"], pools["NodePool/gpu-spot"]
    asked = [pod for pod in ray_pods(render("overlays/eks")) if pod.gpus]
    assert len(asked) == 3
    assert all(_may_stand_on(pod, on_demand) and not _may_stand_on(pod, spot) for pod in asked)
    (reclaimable,) = [
        pod
        for pod in ray_pods(render("overlays/spot"))
        if "raymill/capacity" in pod.spec["nodeSelector"]
    ]
    del reclaimable.spec["nodeSelector"]["nvidia.com/gpu.product"]  # EKS has another label for it
    assert _may_stand_on(reclaimable, spot)


def _may_stand_on(pod: Pod, template: Manifest) -> bool:
    labels = {r["key"]: r["values"] for r in template["spec"]["requirements"]}
    labels |= {
        key: [value] for key, value in template.get("metadata", {}).get("labels", {}).items()
    }
    selected = all(value in labels.get(key, []) for key, value in pod.spec["nodeSelector"].items())
    tolerated = {toleration["key"] for toleration in pod.spec["tolerations"]}
    return selected and {taint["key"] for taint in template["spec"]["taints"]} <= tolerated


def test_an_efa_pod_asks_for_adapters_and_huge_pages_and_keeps_its_confinement() -> None:
    (trainer,) = [
        pod for pod in ray_pods(render("overlays/gpu-node + components/efa")) if pod.gpus == 8
    ]
    limits, requests = (trainer.container["resources"][which] for which in ("limits", "requests"))
    assert (limits["vpc.amazonaws.com/efa"], limits["hugepages-2Mi"]) == ("32", "5120Mi")
    assert (
        limits.items()
        >= {key: requests[key] for key in ("vpc.amazonaws.com/efa", "hugepages-2Mi")}.items()
    )
    assert trainer.container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("network", ["efa", "rdma"])
def test_pods_on_spot_nodes_and_those_behind_them_keep_their_network(network: str) -> None:
    objects = render(f"overlays/gpu-node + components/{network} + components/spot")
    assert [problem for rule in RULES for problem in rule(objects)] == []
    names = [
        {v["name"] for v in pod.container["env"]} for pod in ray_pods(objects) if pod.gpus == 8
    ]
    assert ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in given for given in names] == [True, False]
    assert all("NCCL_SOCKET_IFNAME" in given for given in names)


@pytest.mark.parametrize("network", ["efa", "rdma"])
def test_whole_nodes_queue_too(network: str) -> None:
    objects = render(
        f"overlays/kueue + components/whole-node + components/{network} + components/topology"
    )
    assert operator_rules.queue_problems(objects) == []
    (group,) = find(objects, "ClusterQueue/raymill")["spec"]["resourceGroups"]
    quota = {
        resource["name"]: quantity(resource["nominalQuota"])
        for resource in group["flavors"][0]["resources"]
    }
    assert list(quota) == group["coveredResources"]  # Kueue asks for the same order
    job = cluster_spec(find(objects, "RayJob/pretrain"))
    (workers,) = job["workerGroupSpecs"]
    for resource, least in workers["template"]["spec"]["containers"][0]["resources"][
        "requests"
    ].items():
        assert workers["maxReplicas"] * quantity(least) <= quota[resource], resource


def test_only_trainers_lock_memory_and_only_by_the_component_for_it() -> None:
    objects = render("overlays/gpu-node + components/efa + components/ipc-lock")
    locking = [
        pod.where
        for pod in pods(objects)
        if "add" in pod.container["securityContext"]["capabilities"]
    ]
    assert locking == ["RayJob/pretrain group trainers"]


def test_spot_moves_the_trainers_only_and_has_others_behind_them() -> None:
    objects = render("overlays/spot")
    on_spot = [
        pod.where for pod in ray_pods(objects) if "raymill/capacity" in pod.spec["nodeSelector"]
    ]
    assert on_spot == ["RayJob/pretrain group trainers"]
    groups = {
        g["groupName"]: g
        for g in cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    }
    assert {name: group.get("priority", 0) for name, group in groups.items()} == {
        "trainers": 10,
        "trainers-on-demand": 0,
    }


@pytest.mark.parametrize(
    "kustomization", ["overlays/dev", "overlays/gpu-serving", "overlays/eks", "overlays/gke"]
)
def test_goes_into_another_namespace(kustomization: str) -> None:
    objects = render_into("somewhere-else", kustomization)
    assert find(objects, "Namespace/somewhere-else")["metadata"]["labels"][
        "pod-security.kubernetes.io/enforce"
    ]
    assert [problem for rule in security_rules.RULES for problem in rule(objects)] == []
    subjects = find(objects, "RoleBinding/raymill-operators")["subjects"]
    assert [subject["kind"] for subject in subjects] == ["Group"]


def test_the_group_may_do_what_the_page_tells_it_to_watch_and_repeat() -> None:
    rules = find(render("base"), "Role/raymill-operator")["rules"]
    rights = {
        (resource, verb)
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    logs = {("pods", "list"), ("pods", "get"), ("pods/log", "get")}
    forwarding = {("services", "get"), ("pods/portforward", "create")}
    again = {("rayjobs", "delete"), ("rayjobs", "create")}
    assert (
        rights
        >= {(kind, "list") for kind in ("rayjobs", "rayservices", "rayclusters")}
        | logs
        | forwarding
        | again
    )
    assert not {resource for resource, _ in rights} & {"secrets", "pods/exec"}


def test_every_component_is_rendered() -> None:
    folders = {folder.name for folder in (K8S / "components").iterdir()}
    assert folders == COMPONENTS.keys()


def test_kueue_holds_every_job_until_there_is_room() -> None:
    objects = render("overlays/kueue")
    queued = {
        name_of(o): o["spec"].get("suspend") for o in objects if QUEUE in o["metadata"]["labels"]
    }
    assert queued == {name_of(o): True for o in of_kind(objects, "RayCluster", "RayJob")}


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_endpoint_builds_from_its_manifest(kustomization: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    config = run_rules.serve_config(find(render(kustomization), "RayService/completions"))
    app = build_app(config.model_copy(update={"api_key_file": str(keys)}))
    assert isinstance(app, serve.Application)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare makes a PID namespace here")
@pytest.mark.parametrize("kind", CLUSTER_KINDS)
def test_the_autoscaler_ends_at_sigterm_as_the_first_process_of_its_container(kind: str) -> None:
    """The kernel drops a signal for which the first process of a PID namespace has no handler, as
    Python has none."""
    (options, *_) = [
        cluster_spec(manifest)["autoscalerOptions"] for manifest in of_kind(render("base"), kind)
    ]
    container = [
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
        "/bin/bash",
        "-c",
        "--",
    ]
    start = {"KUBERAY_GEN_AUTOSCALER_START_CMD": f"sleep {limit_s(60):.0f}"}
    process = subprocess.Popen([*container, *options["args"]], env=os.environ | start)
    try:
        wait_until(lambda: _has_started(process.pid), timeout_s=30)
        psutil.Process(process.pid).children()[0].terminate()
        process.wait(timeout=limit_s(20))
    finally:
        process.kill()
        process.wait()


def _has_started(pid: int) -> bool:
    """Says whether what the shell starts is there, and the shell waits for it: between the two it
    does not know yet what it is to end."""
    shell, *started = psutil.Process(pid).children(recursive=True) or [None]
    is_there = "sleep" in [process.name() for process in started]
    return is_there and shell.status() == psutil.STATUS_SLEEPING
