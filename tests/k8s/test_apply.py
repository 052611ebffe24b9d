"""`raymill cluster apply` works any number of times, on what KubeRay, the autoscaler, Kueue and
`scale` wrote since."""

import copy
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.kube.client import KubeApi
from tests.k8s.api_stand_in import ApiStandIn, Fault
from tests.k8s.cluster_cli import CORE, RAY, Asked, cluster_behind, ray_object, stand_in
from tests.k8s.manifests import K8S, cluster_spec, find, kubectl, name_of, render
from tests.k8s.operator_stand_in import OperatorStandIn


def group_of(api: ApiStandIn, kind: str, name: str) -> dict[str, object]:
    (group,) = cluster_spec(ray_object(api, kind, name))["workerGroupSpecs"]
    return group


def two_pods() -> list[dict[str, object]]:
    """Returns the patch by which the autoscaler requests two."""
    return [{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 2}]


@pytest.mark.more
def test_every_object_is_applied_and_twice_is_once(api: ApiStandIn, asked: Asked) -> None:
    names = [name_of(manifest) for manifest in render("overlays/kueue")]
    assert asked("apply", "kueue", "--component", "pretrain", "--dry-run") == {
        "checked": ["RayJob/pretrain"]
    }
    assert api.get(f"{RAY}/rayjobs/pretrain") is None
    assert asked("apply", "kueue") == {"applied": names}
    for path in (
        f"{RAY}/rayjobs/pretrain",
        "/api/v1/namespaces/raymill",
        "/apis/networking.k8s.io/v1/namespaces/raymill/networkpolicies/default-deny",
        "/apis/scheduling.k8s.io/v1/priorityclasses/raymill-head",
        "/apis/kueue.x-k8s.io/v1beta2/clusterqueues/raymill",
    ):
        assert api.get(path) is not None, path
    before = ray_object(api, "RayJob", "pretrain")
    OperatorStandIn(api).look()  # which writes the worker groups of `shared` anew, and so owns them
    assert asked("apply", "kueue") == {"applied": names}
    assert ray_object(api, "RayJob", "pretrain")["spec"] == before["spec"]


@pytest.mark.more
def test_what_the_autoscaler_and_scale_set_stays(api: ApiStandIn, asked: Asked) -> None:
    operator = OperatorStandIn(api)
    asked("apply", "dev")
    operator.look()
    replicas = [
        *two_pods(),
        {
            "op": "add",
            "path": "/spec/workerGroupSpecs/0/scaleStrategy",
            "value": {"workersToDelete": ["a"]},
        },
    ]
    api.patch(
        f"{RAY}/rayclusters/shared",
        "application/json-patch+json",
        replicas,
        manager="python-requests",
    )
    asked("scale", "shared", "--max", "7")
    asked("scale", "completions", "--max", "5")
    asked("scale", "completions", "--min", "2")
    asked("scale", "rayjob/pretrain", "--group", "trainers", "--min", "0", "--max", "0")
    asked("scale", "rayjob/tokenize", "--suspend")
    operator.look()
    result = asked("apply", "dev")
    assert "failed" not in result
    assert result["kept"] == {
        "RayCluster/shared": ["workers: 0 to 7 pods, as `raymill cluster scale` left it"],
        "RayJob/pretrain": ["trainers: 0 to 0 pods, as `raymill cluster scale` left it"],
        "RayService/completions": ["servers: 2 to 5 pods, as `raymill cluster scale` left it"],
    }
    shared = group_of(api, "RayCluster", "shared")
    assert (shared["replicas"], shared["scaleStrategy"]) == (2, {"workersToDelete": ["a"]})
    assert (shared["minReplicas"], shared["maxReplicas"]) == (0, 7)
    assert ray_object(api, "RayJob", "tokenize")["spec"]["suspend"] is True
    assert group_of(api, "RayJob", "pretrain")["maxReplicas"] == 0


def test_kubectl_undoes_what_the_autoscaler_and_scale_set(
    api: ApiStandIn, asked: Asked, tmp_path: Path
) -> None:
    """Has kubectl itself apply, which sends the whole list of worker groups; the stand-in has no
    schemas for it to check."""
    flags = [
        "-l",
        "app.kubernetes.io/component=shared",
        "--validate=false",
        "--cache-dir",
        str(tmp_path),
    ]
    asked("apply", "dev")
    api.patch(
        f"{RAY}/rayclusters/shared",
        "application/json-patch+json",
        two_pods(),
        manager="python-requests",
    )
    asked("scale", "shared", "--max", "7")
    group = group_of(api, "RayCluster", "shared")
    assert (group["replicas"], group["maxReplicas"]) == (2, 7)
    subprocess.run([kubectl(), "apply", "-k", str(K8S / "overlays/dev"), *flags], check=True)
    group = group_of(api, "RayCluster", "shared")
    assert (group["replicas"], group["maxReplicas"]) == (0, 2)
    api.requests.clear()  # which an administrator made


def test_bounds_that_the_overlay_changes_afterwards_win(api: ApiStandIn, asked: Asked) -> None:
    asked("apply", "dev", "--component", "shared")
    asked("scale", "shared", "--max", "7")
    assert "kept" not in asked("apply", "gpu", "--component", "shared")  # 4 there, 2 in `dev`
    assert group_of(api, "RayCluster", "shared")["maxReplicas"] == 4
    asked("scale", "shared", "--max", "9")
    assert "kept" in asked("apply", "gpu", "--component", "shared")
    assert group_of(api, "RayCluster", "shared")["maxReplicas"] == 9


@pytest.mark.more
def test_bounds_that_the_overlay_changes_reach_what_runs(api: ApiStandIn, asked: Asked) -> None:
    """KubeRay passes none to the cluster of a service."""
    asked("apply", "dev")
    OperatorStandIn(api).look()
    before = cluster_behind(api, ray_object(api, "RayService", "completions"))["metadata"]["name"]
    (group,) = cluster_spec(find(render("base"), "RayService/completions"))["workerGroupSpecs"]
    most = group_of(api, "RayService", "completions")["maxReplicas"]
    assert most != group["maxReplicas"]
    service = ray_object(api, "RayService", "completions")
    # As an overlay of before had it
    cluster_spec(service)["workerGroupSpecs"][0]["maxReplicas"] = 9
    api.put(f"{RAY}/rayservices/completions", service)
    cluster = ray_object(api, "RayCluster", before)
    cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 9
    api.put(f"{RAY}/rayclusters/{before}", cluster)
    result = asked("apply", "dev", "--component", "completions")
    lowest = group_of(api, "RayService", "completions")["minReplicas"]
    assert result["running"] == {f"RayCluster/{before}": [f"servers: {lowest} to {most} pods"]}
    assert group_of(api, "RayCluster", before)["maxReplicas"] == most
    assert "running" not in asked("apply", "dev", "--component", "completions")


def test_a_queued_job_that_runs_is_not_suspended_again(api: ApiStandIn, asked: Asked) -> None:
    asked("apply", "kueue")
    admit = [{"op": "replace", "path": "/spec/suspend", "value": False}]
    api.patch(f"{RAY}/rayjobs/pretrain", "application/json-patch+json", admit, manager="kueue")
    assert "failed" not in asked("apply", "kueue")
    assert ray_object(api, "RayJob", "pretrain")["spec"]["suspend"] is False


def test_an_apply_that_others_write_into_is_tried_again(
    api: ApiStandIn, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Has the autoscaler request two pods between the reading and the writing."""
    asked("apply", "dev")
    ask, written = KubeApi._ask, []

    def interfering(self: KubeApi, method: str, path: str, **given: object) -> object:
        found = ask(self, method, path, **given)  # type: ignore[arg-type]
        if method == "GET" and path.endswith("/rayclusters/shared") and not written:
            written.append(path)
            api.patch(path, "application/json-patch+json", two_pods(), manager="python-requests")
        return found

    monkeypatch.setattr(KubeApi, "_ask", interfering)
    assert "failed" not in asked("apply", "dev", "--component", "shared")
    assert written
    assert group_of(api, "RayCluster", "shared")["replicas"] == 2


@pytest.mark.more
def test_what_is_refused_is_said_and_the_rest_is_applied(api: ApiStandIn, asked: Asked) -> None:
    asked("apply", "dev")
    raised = [{"op": "replace", "path": "/spec/hard/pods", "value": "99"}]
    quota = "/api/v1/namespaces/raymill/resourcequotas/raymill"
    api.patch(quota, "application/json-patch+json", raised, manager="kubectl-edit")
    result = asked("apply", "dev", code=1)
    (refused,) = result["failed"].items()
    assert refused[0] == "ResourceQuota/raymill"
    assert (
        "another field manager owns a part" in refused[1]
        and 'conflict with "kubectl-edit" using v1: .spec.hard.pods' in refused[1]
    )
    assert len(result["applied"]) == len(render("overlays/dev")) - 1
    assert api.get(quota)["spec"]["hard"]["pods"] == "99"

    api.not_installed.add("ray.io")
    result = asked("apply", "dev", code=1)
    assert (
        "its kind is not installed: apply KubeRay's operator" in result["failed"]["RayJob/pretrain"]
    )


def test_who_may_not_apply_the_platform_is_told_once_who_may(api: ApiStandIn, asked: Asked) -> None:
    api.forbidden |= {"networkpolicies", "rayjobs", "services"}
    result = asked("apply", "dev", code=1)
    assert "only an administrator may" in result["failed"]["Service/redis"], "others may look at it"
    policy, job = result["failed"]["NetworkPolicy/dns"], result["failed"]["RayJob/pretrain"]
    assert "only an administrator may" in policy and "raymill-operators" not in policy
    assert "gives the group raymill-operators that right" in job
    assert result["note"] == "an administrator applies the component `platform`"


@pytest.mark.more
def test_a_dry_run_on_an_empty_cluster_checks_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    with stand_in(tmp_path, monkeypatch, namespaces=()) as api:
        result = asked("apply", "dev", "--dry-run")
        assert (
            "Namespace/raymill" in result["checked"]
            and "PriorityClass/raymill-head" in result["checked"]
        )
        assert "RayJob/pretrain" in result["not_checked"]
        assert "apply the component `platform`, then check again" in result["note"]
        assert len(result["checked"]) + len(result["not_checked"]) == len(render("overlays/dev"))
        assert api.get("/api/v1/namespaces/raymill") is None
        api.not_installed.add("ray.io")
        assert (
            "kind is not installed"
            in asked("apply", "dev", "--dry-run", code=1)["failed"]["RayJob/pretrain"]
        )
        api.not_installed.clear()
        assert len(asked("apply", "dev")["applied"]) == len(render("overlays/dev"))


def test_all_goes_into_another_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    with stand_in(tmp_path, monkeypatch, namespaces=()) as api:
        assert "failed" not in asked("apply", "dev", "-n", "elsewhere")
        assert api.get("/apis/ray.io/v1/namespaces/elsewhere/rayjobs/pretrain") is not None
        assert api.get(f"{RAY}/rayjobs/pretrain") is None
        api.requests.clear()


@pytest.mark.more
def test_what_kubectl_applied_is_taken_over_and_what_it_alone_had_goes(
    api: ApiStandIn, asked: Asked, tmp_path: Path
) -> None:
    """Has kubectl itself apply an earlier version, as the README's first way does."""
    older = render("overlays/dev")
    dns, role = find(older, "NetworkPolicy/dns"), find(older, "Role/raymill-operator")
    dns["spec"]["egress"] = [{}]
    dns["metadata"]["annotations"] = {"of-an-earlier-version": "true"}
    role["rules"][0]["verbs"].append("deletecollection")
    shared = find(older, "RayCluster/shared")
    shared["spec"]["headGroupSpec"]["enableIngress"] = True
    (tmp_path / "older.yaml").write_text(yaml.safe_dump_all(older))
    kubectls = ["--validate=false", "--cache-dir", str(tmp_path / "cache"), "-n", "raymill"]
    subprocess.run([kubectl(), "apply", "-f", str(tmp_path / "older.yaml"), *kubectls], check=True)
    policies = "/apis/networking.k8s.io/v1/namespaces/raymill/networkpolicies"
    assert api.get(f"{policies}/dns")["spec"]["egress"] == [{}]

    assert "failed" not in asked("apply", "dev", "--dry-run")
    assert api.get(f"{policies}/dns")["spec"]["egress"] == [{}]
    for _ in range(2):
        result = asked("apply", "dev")
        assert "failed" not in result and len(result["applied"]) == len(older)
    policy = api.get(f"{policies}/dns")
    assert (
        policy["spec"]["egress"]
        == find(render("overlays/dev"), "NetworkPolicy/dns")["spec"]["egress"]
    )
    assert not policy["metadata"].get("annotations"), (
        "kubectl's last manifest, and what the version no longer has"
    )
    rules = api.get("/apis/rbac.authorization.k8s.io/v1/namespaces/raymill/roles/raymill-operator")[
        "rules"
    ]
    assert rules == find(render("overlays/dev"), "Role/raymill-operator")["rules"]
    head = ray_object(api, "RayCluster", "shared")["spec"]["headGroupSpec"]
    assert "enableIngress" not in head
    owners = {entry["manager"] for entry in policy["metadata"]["managedFields"]}
    assert owners == {"raymill"}

    raised = [{"op": "replace", "path": "/spec/hard/pods", "value": "99"}]
    subprocess.run([kubectl(), "apply", "-f", str(tmp_path / "older.yaml"), *kubectls], check=True)
    quota = "/api/v1/namespaces/raymill/resourcequotas/raymill"
    api.patch(quota, "application/json-patch+json", raised, manager="kubectl-edit")
    (refused,) = asked("apply", "dev", code=1)["failed"].items()
    assert refused[0] == "ResourceQuota/raymill" and 'conflict with "kubectl-edit"' in refused[1]
    assert api.get(quota)["spec"]["hard"]["pods"] == "99", "a person's edit"
    api.requests.clear()  # which an administrator made


@pytest.mark.more
def test_what_a_version_no_longer_has_is_named_with_the_line_that_removes_it(
    api: ApiStandIn, asked: Asked
) -> None:
    asked("apply", "dev")
    budgets = "/apis/policy/v1/namespaces/raymill/poddisruptionbudgets"
    old = copy.deepcopy(find(render("overlays/dev"), "PodDisruptionBudget/pretrain-head"))
    old["metadata"]["name"] = "pretrain-workers"
    api.put(f"{budgets}/pretrain-workers", old)
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"labels": dict(old["metadata"]["labels"])},
    }
    job = ray_object(api, "RayJob", "pretrain")
    (used,) = (
        volume["configMap"]["name"]
        for volume in cluster_spec(job)["headGroupSpec"]["template"]["spec"]["volumes"]
        if volume["name"] == "run-config"
    )
    for name in (used, "run-config-older"):
        api.put(
            f"{CORE}/configmaps/{name}",
            settings | {"metadata": settings["metadata"] | {"name": name}},
        )
    run = copy.deepcopy(job)
    run["metadata"] |= {"name": "run-x-1", "annotations": {"raymill/run-id": "x"}}
    api.put(f"{RAY}/rayjobs/run-x-1", run)
    somebodys = {"kind": "ConfigMap", "metadata": {"name": "somebodys"}}
    api.put(f"{CORE}/configmaps/somebodys", somebodys)

    for words in (("--dry-run",), ("--component", "platform"), ()):
        result = asked("apply", "dev", *words)
        assert set(result["leftovers"]) == {
            "ConfigMap/run-config-older",
            "PodDisruptionBudget/pretrain-workers",
        }
    command = result["remove"].split()
    assert command[:4] == ["kubectl", "-n", "raymill", "delete"]
    assert set(command[4:]) == {
        "configmap/run-config-older",
        "poddisruptionbudget/pretrain-workers",
    }
    assert "leftovers" not in asked("apply", "dev", "--component", "pretrain"), (
        "an operator may not list them"
    )


def test_a_kind_of_the_whole_cluster_is_applied_under_another_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    """To kustomize, Kueue's kinds of cluster scope look as if they had a namespace."""
    with stand_in(tmp_path, monkeypatch, namespaces=("elsewhere",)) as api:
        assert "failed" not in asked("apply", "kueue", "-n", "elsewhere")
        for path in (
            "clusterqueues/raymill",
            "resourceflavors/raymill",
            "namespaces/elsewhere/localqueues/raymill",
        ):
            found = api.get(f"/apis/kueue.x-k8s.io/v1beta2/{path}")
            assert found is not None, path
            assert ("namespace" in found["metadata"]) is ("namespaces/" in path)
        api.requests.clear()


def test_an_apply_that_loses_the_api_says_what_it_has_applied(
    api: ApiStandIn, asked: Asked
) -> None:
    names = [name_of(manifest) for manifest in render("overlays/dev")]
    api.faults += [("APPLY /apis/ray.io/v1/namespaces/raymill/rayjobs/pretrain", Fault.LOST)] * 99
    result = asked("apply", "dev", code=1)
    at = names.index("RayJob/pretrain")
    assert result["applied"] == names[:at]
    assert list(result["failed"]) == ["RayJob/pretrain"]
    assert result["not_tried"] == names[at + 1 :]


def test_a_busy_api_and_a_lost_answer_are_tried_again(api: ApiStandIn, asked: Asked) -> None:
    api.faults += [("rayjobs/pretrain", Fault.BUSY), ("rayclusters/shared", Fault.LOST)]
    assert "failed" not in asked("apply", "dev")
    api.faults += [("PATCH", Fault.BUSY)]
    asked("scale", "shared", "--max", "7")
    assert not api.faults
    assert group_of(api, "RayCluster", "shared")["maxReplicas"] == 7
