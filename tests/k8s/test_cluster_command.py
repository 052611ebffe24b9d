"""`raymill cluster` works through the official client, against a stand-in for the API that validates nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.manifests import find, name_of, render

_RAY = "/apis/ray.io/v1/namespaces/raymill"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture
def api(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStandIn]:
    with ApiStandIn(certificates).serving() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig()))
        yield api
        rights = {
            (group, resource, verb)
            for rule in find(render("base"), "Role/raymill-operator")["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        assert {_right(line) for line in api.requests if "fieldManager" not in line} <= rights


def _right(request: str) -> tuple[str, str, str]:
    """Returns the (API group, resource, verb) that a request needs; only applying needs an administrator."""
    method, path = request.split()
    root, _, rest = path.partition("?")[0].partition("/namespaces/raymill/")
    resource, _, name = rest.partition("/")
    group = root.split("/")[2] if root.startswith("/apis/") else ""
    return group, resource, {"GET": "get" if name else "list", "PATCH": "patch"}[method]


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["cluster", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 1) -> str:
    assert main(["cluster", *argv]) == code
    return capsys.readouterr().err


def test_render_prints_what_kustomize_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "render", "gpu", "--component", "pretrain"]) == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    assert job == find(render("overlays/gpu"), "RayJob/pretrain")
    assert "expected one of completions, evaluate" in refused(capsys, "render", "dev", "--component", "x", code=2)


def test_apply_makes_each_object_and_twice_is_once(api: ApiStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name_of(manifest) for manifest in render("overlays/kueue")]
    assert asked(capsys, "apply", "kueue", "--component", "pretrain", "--dry-run") == {"checked": ["RayJob/pretrain"]}
    assert api.get(f"{_RAY}/rayjobs/pretrain") is None
    assert asked(capsys, "apply", "kueue") == {"applied": names}
    for path in (
        f"{_RAY}/rayjobs/pretrain",
        "/api/v1/namespaces/raymill",
        "/apis/networking.k8s.io/v1/namespaces/raymill/networkpolicies/default-deny",
        "/apis/scheduling.k8s.io/v1/priorityclasses/raymill-head",
        "/apis/kueue.x-k8s.io/v1beta2/clusterqueues/raymill",
    ):
        assert api.get(path) is not None, path
    before = api.get(f"{_RAY}/rayjobs/pretrain")["spec"]
    asked(capsys, "apply", "kueue", "--component", "pretrain")
    assert api.get(f"{_RAY}/rayjobs/pretrain")["spec"] == before
    assert all("fieldManager=raymill" in line for line in api.requests if line.startswith("PATCH"))


def test_a_jobs_group_is_scaled_on_the_cluster_that_it_made(
    api: ApiStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    job = find(render("overlays/gpu"), "RayJob/pretrain")
    assert "has no cluster now: it has not been seen by KubeRay" in _with(
        api, job, lambda: refused(capsys, "scale", "pretrain", "--max", "3")
    )
    job["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "pretrain-x"}
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "pretrain-x", "namespace": "raymill"},
    }
    api.put(f"{_RAY}/rayjobs/pretrain", job)
    api.put(f"{_RAY}/rayclusters/pretrain-x", cluster | {"spec": job["spec"]["rayClusterSpec"]})
    assert asked(capsys, "scale", "rayjob/pretrain", "--max", "3") == {
        "changed": "RayCluster/pretrain-x",
        "groups": ["trainers: 0 to 3 pods"],
    }
    asked(capsys, "scale", "pretrain", "--group", "trainers", "--suspend")
    assert asked(capsys, "status", "pretrain-x")["RayCluster/pretrain-x"][1].startswith("trainers: suspended, 0 to 3")
    asked(capsys, "scale", "pretrain", "--group", "trainers", "--resume")
    asked(capsys, "scale", "pretrain", "--suspend")
    assert api.get(f"{_RAY}/rayjobs/pretrain")["spec"]["suspend"] is True
    assert list(asked(capsys, "status")) == ["RayJob/pretrain"]  # its cluster is a part of it
    assert "nothing to change" in refused(capsys, "scale", "pretrain-x", code=2)
    assert "it has RayCluster/pretrain-x, RayJob/pretrain" in refused(capsys, "scale", "other", "--max", "1")


def test_why_pending_reads_pods_and_events(api: ApiStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    shared = find(render("base"), "RayCluster/shared") | {"status": {"state": "ready"}}
    api.put(f"{_RAY}/rayclusters/shared", shared)
    assert asked(capsys, "why-pending") == {"pending": "nothing: every requested pod runs"}
    labels = {"ray.io/cluster": "shared", "ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    scheduled["message"] = "0/3 nodes are available: 3 Insufficient cpu."
    pod = {"metadata": {"name": "shared-w", "labels": labels}, "spec": {}}
    pod["status"] = {"phase": "Pending", "conditions": [scheduled]}
    api.put("/api/v1/namespaces/raymill/pods/shared-w", pod)
    event = {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Pod", "name": "shared-w"},
        "reason": "TriggeredScaleUp",
    }
    api.put("/api/v1/namespaces/raymill/events/e", event)
    reason = "no node of 3 has room: 3 lack cpu; a node is on its way"
    assert asked(capsys, "why-pending", "shared") == {"shared-w": reason}


def test_errors_are_for_people(
    api: ApiStandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "has no RayCluster, RayJob or RayService" in refused(capsys, "status")
    assert "has no nothing; it has none" in refused(capsys, "status", "nothing")
    settings = yaml.safe_load(api.kubeconfig().read_text())
    settings["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    assert "no Kubernetes API answers at https://127.0.0.1:1" in refused(capsys, "status")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    assert "no Kubernetes is configured" in refused(capsys, "status")


def _with(api: ApiStandIn, job: dict[str, Any], ask: Any) -> str:
    api.put(f"{_RAY}/rayjobs/pretrain", job)
    return ask()
