"""`raymill cluster` prints its results and errors, through the official client and against a
stand-in for the API."""

from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.kube import client
from tests.k8s.api_stand_in import ApiStandIn, Fault
from tests.k8s.cluster_cli import RAY, Asked, cluster_behind, ray_object
from tests.k8s.manifests import OVERLAYS, find, render
from tests.k8s.operator_stand_in import OperatorStandIn


def test_render_prints_what_kustomize_makes(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "render", "gpu", "--component", "pretrain"]) == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    assert job == find(render("overlays/gpu"), "RayJob/pretrain")
    assert "expected one of completions, evaluate" in asked.refused(
        "render", "dev", "--component", "x", code=2
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_takes_another_namespace(overlay: str, asked: Asked) -> None:
    objects = asked("render", overlay, "-n", "elsewhere")["objects"]
    (namespace,) = (o for o in objects if o["kind"] == "Namespace")
    assert namespace["metadata"]["name"] == "elsewhere"
    assert {o["metadata"].get("namespace") for o in objects} <= {"elsewhere", None}
    (binding,) = (o for o in objects if o["kind"] == "RoleBinding")
    assert {subject["kind"] for subject in binding["subjects"]} == {"Group"}
    text = yaml.safe_dump(objects)
    assert "metadata.name: raymill\n" not in text, "a selector of the old namespace"
    error = asked.refused("render", "nothing", "-n", "elsewhere", code=2)
    assert "unknown overlay 'nothing'" in error


@pytest.mark.more
def test_status_says_what_is_wanted_what_runs_and_what_is_suspended(
    api: ApiStandIn, asked: Asked
) -> None:
    operator = OperatorStandIn(api)
    asked("apply", "dev")
    operator.look()
    said = asked("status")
    assert list(said) == [
        "RayCluster/shared",
        "RayJob/evaluate",
        "RayJob/pretrain",
        "RayJob/tokenize",
        "RayService/completions",
    ]
    assert said["RayCluster/shared"][1:] == ["workers: 0 to 2 pods, 0 wanted, 0 running"]
    # `replicas` is 0
    assert said["RayJob/pretrain"][1:] == ["trainers: 1 to 2 pods, 1 wanted, 1 running"]
    assert said["RayService/completions"][1:] == ["servers: 1 to 2 pods, 1 wanted, 1 running"]
    asked("scale", "rayjob/pretrain", "--group", "trainers", "--min", "0", "--max", "0")
    operator.look()
    assert asked("status", "pretrain")["RayJob/pretrain"][1:] == [
        "trainers: 0 to 0 pods, 0 wanted, 0 running"
    ]
    asked("scale", "pretrain", "--suspend")
    operator.look()
    assert asked("status", "pretrain")["RayJob/pretrain"] == [
        "is suspended: it has no pods; `raymill cluster scale` with --resume brings it back",
        "trainers: 0 to 0 pods",
    ]


def test_status_shows_a_service_whose_next_cluster_starts(api: ApiStandIn, asked: Asked) -> None:
    operator = OperatorStandIn(api)
    asked("apply", "dev")
    operator.look()
    operator.fates = [
        (lambda pod: pod["metadata"]["name"] not in running, ({"phase": "Pending"}, []))
    ]
    running = [
        item["metadata"]["name"] for item in api.list("/api/v1/namespaces/raymill/pods")["items"]
    ]
    service = api.get(f"{RAY}/rayservices/completions")
    service["spec"]["rayClusterConfig"]["rayVersion"] = "2.60.1"
    api.put(f"{RAY}/rayservices/completions", service)
    operator.look()
    service = api.get(f"{RAY}/rayservices/completions")
    active, pending = (
        service["status"][f"{which}ServiceStatus"]["rayClusterName"]
        for which in ("active", "pending")
    )
    assert asked("status", "completions")["RayService/completions"][1:] == [
        f"{active}: servers: 1 to 2 pods, 1 wanted, 1 running",
        f"{pending}: servers: 1 to 2 pods, 1 wanted, 0 running",
    ]
    assert list(asked("status"))[-1] == "RayService/completions"
    # Not "(Unknown)"
    assert asked("status", pending)[f"RayCluster/{pending}"][0] == "waits for its head"


def test_errors_are_for_people(
    api: ApiStandIn, asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "has no RayCluster, RayJob or RayService" in asked.refused("status")
    assert "has no nothing; it has none" in asked.refused("status", "nothing")
    settings = yaml.safe_load(api.kubeconfig().read_text())
    settings["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "elsewhere").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "elsewhere"))
    assert "no Kubernetes API answers at https://127.0.0.1:1" in asked.refused("status")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    assert "no Kubernetes is configured" in asked.refused("status")


def test_a_services_old_cluster_is_not_one_of_its_own(api: ApiStandIn, asked: Asked) -> None:
    """In the last minute of an upgrade the service's status no longer names it."""
    asked("apply", "dev")
    OperatorStandIn(api).look()
    service = ray_object(api, "RayService", "completions")
    old = cluster_behind(api, service)["metadata"]["name"]
    status = {"conditions": [], "activeServiceStatus": {"rayClusterName": "completions-new"}}
    api.put(f"{RAY}/rayservices/completions", service | {"status": status})
    said = asked("status")
    assert f"RayCluster/{old}" not in said and "RayCluster/shared" in said


def test_an_api_that_is_silent_is_told_of_and_ends_the_command(
    api: ApiStandIn, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are taken and not answered, as with an etcd that is stopped."""
    tries = 1 + client._RETRIES.read
    assert client._TIMEOUT_S * tries <= 60, "the bound that the page states"
    for name, value in (("_SAYS_AFTER_S", 0.1), ("_TIMEOUT_S", 0.5), ("_SHORT_TIMEOUT_S", 0.2)):
        monkeypatch.setattr(client, name, value)
    asked("apply", "dev", "--component", "shared")
    api.requests.clear()
    api.faults = [("/", Fault.SILENT)] * 99
    said = asked.refused("status")
    assert said.count("has not answered for") == 1, "once, and while it is waited for"
    assert said.index("has not answered for") < said.index("no Kubernetes API answers at")
    assert len(api.requests) == tries
    api.requests.clear()
    api.faults = [("PATCH", Fault.SILENT), ("APPLY", Fault.SILENT)] * 99
    result = asked("apply", "dev", code=1)
    assert len(result["failed"]) == 1 and result["not_tried"]
    assert len([line for line in api.requests if line.startswith("APPLY")]) == tries
