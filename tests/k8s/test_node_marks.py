"""Nodes of Kubernetes on which a worker was found wrong are tainted, say why, and are taken back."""

from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.kube.node_marks import TAINT, conditioned, owner_of, tainted, untainted
from cluster.storage.uris import open_storage
from jobs.workers.left_out_nodes import KUBERNETES_NODE_VARIABLE, leave_out
from tests.k8s.api_stand_in import ApiStandIn, Fault
from tests.k8s.cluster_cli import Asked
from tests.k8s.manifests import Manifest, find, pods, render

PLACE = {"node": "pretrain-trainers-x", "node_id": "ab", "reason": "step 7: its gradient was wrong"}
READY = {"type": "Ready", "status": "True"}
CORDONED = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}


@pytest.fixture
def nodes(api: ApiStandIn) -> ApiStandIn:
    for name in ("a", "b"):
        spec: dict[str, Any] = {"taints": [CORDONED]} if name == "b" else {}
        node = {"kind": "Node", "metadata": {"name": name}, "spec": spec}
        api.put(f"/api/v1/nodes/{name}", node | {"status": {"conditions": [READY]}})
    return api


def node(api: ApiStandIn, name: str) -> Manifest:
    found = api.get(f"/api/v1/nodes/{name}")
    assert found is not None
    return found


def taints(api: ApiStandIn, name: str) -> list[str]:
    return [taint["key"] for taint in node(api, name)["spec"].get("taints", [])]


def condition(api: ApiStandIn, name: str) -> Manifest:
    (found,) = [at for at in node(api, name)["status"]["conditions"] if at != READY]
    return found


def test_a_left_out_node_is_marked_and_a_released_one_taken_back(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked
) -> None:
    storage, where = open_storage(str(tmp_path)), ["--storage.uri", str(tmp_path)]
    leave_out(storage, PLACE | {"kubernetes_node": "b"})
    leave_out(storage, PLACE | {"node": "on-no-kubernetes", "kubernetes_node": None})
    leave_out(storage, PLACE | {"node": "elsewhere", "kubernetes_node": "c"})
    marked = {"marked": ["b"], "released": [], "not_here": ["c"]}
    assert asked("quarantine", *where) == marked
    assert taints(nodes, "a") == []
    assert taints(nodes, "b") == [CORDONED["key"], TAINT]
    told = condition(nodes, "b")
    assert (told["type"], told["status"]) == ("RaymillComputesWrong", "True")
    assert told["message"] == PLACE["reason"]
    nodes.requests.clear()
    assert asked("quarantine", *where) == marked | {"marked": []}, "and what is marked stays so"
    assert nodes.requests == ["GET /api/v1/nodes"], "at the price of a list"

    released = asked("release", PLACE["node"], *where)
    assert released["note"] == "so does the node b of Kubernetes with pods"
    assert taints(nodes, "b") == [CORDONED["key"]]
    assert condition(nodes, "b")["status"] == "False"


def test_a_release_says_of_which_node_the_taint_went(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, where = open_storage(str(tmp_path)), ["--storage.uri", str(tmp_path)]
    for pod, kubernetes_node in (("x", "a"), ("y", "a"), ("z", "zzz"), ("w", "b")):
        leave_out(storage, PLACE | {"node": pod, "kubernetes_node": kubernetes_node})
        if pod == "z":
            asked("quarantine", *where)
    expected = {
        "x": "the node a of Kubernetes is still left out, for y",
        "y": "so does the node a of Kubernetes with pods",
        "z": "the node zzz of Kubernetes is not in this cluster: no taint was taken away",
    }
    taken = [asked("release", pod, *where)["note"] for pod in expected]
    assert taken == list(expected.values())
    assert taints(nodes, "a") == []
    leave_out(storage, PLACE | {"node": "v", "kubernetes_node": "a"})
    assert main(["cluster", "release", "v", *where]) == 0
    never = "the node a of Kubernetes had no taint of this storage"
    assert capsys.readouterr().out == f"node v gets training workers again; {never}\n"


def test_each_request_is_a_right_of_the_component(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked
) -> None:
    leave_out(open_storage(str(tmp_path)), PLACE | {"kubernetes_node": "a"})
    asked("quarantine", "--storage.uri", str(tmp_path))
    rules = find(render("overlays/gpu + components/node-marks"), "ClusterRole/raymill-node-marker")
    rights = {
        (resource, verb)
        for rule in rules["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked_for = {line.partition("?")[0] for line in nodes.requests}
    assert asked_for == {
        "GET /api/v1/nodes",
        "GET /api/v1/nodes/a",
        "PATCH /api/v1/nodes/a",
        "PATCH /api/v1/nodes/a/status",
    }
    assert rights == {
        ("nodes", "list"),
        ("nodes", "get"),
        ("nodes", "patch"),
        ("nodes/status", "patch"),
    }


def test_who_may_not_is_told_what_an_administrator_runs(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked
) -> None:
    where = ["--storage.uri", str(tmp_path)]
    leave_out(open_storage(str(tmp_path)), PLACE | {"kubernetes_node": "a"})
    nodes.forbidden.add("nodes")
    said = asked.refused("quarantine", *where)
    assert "k8s/components/node-marks gives the group raymill-operators that right" in said
    owner = owner_of(open_storage(str(tmp_path)).uri)
    assert f"kubectl taint nodes a {TAINT}={owner}:NoSchedule" in said
    assert taints(nodes, "a") == []


def test_a_release_without_rights_says_that_the_taint_stays(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked
) -> None:
    where = ["--storage.uri", str(tmp_path)]
    leave_out(open_storage(str(tmp_path)), PLACE | {"kubernetes_node": "a"})
    asked("quarantine", *where)
    nodes.forbidden.add("nodes")
    released = asked("release", PLACE["node"], *where)
    assert "the node a of Kubernetes keeps its taint until" in released["note"]
    assert taints(nodes, "a") == [TAINT]


def test_what_was_cut_off_between_condition_and_taint_is_done_again(
    tmp_path: Path, nodes: ApiStandIn, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kube.client._RETRIES", 0)
    where = ["--storage.uri", str(tmp_path)]
    leave_out(open_storage(str(tmp_path)), PLACE | {"kubernetes_node": "a"})
    nodes.faults.append(("PATCH /api/v1/nodes/a?", Fault.CUT))
    asked.refused("quarantine", *where)
    assert (condition(nodes, "a")["status"], taints(nodes, "a")) == ("True", [])
    assert asked("quarantine", *where)["marked"] == ["a"]
    assert taints(nodes, "a") == [TAINT]


def test_a_node_that_is_written_meanwhile_is_read_again() -> None:
    """The version that was read is a part of the patch."""
    before: Manifest = {"metadata": {"resourceVersion": "7"}, "spec": {}}
    patches = [tainted(before, "ours"), conditioned(before, "why", now="2026-01-01T00:00:00Z")]
    tests = [patch[0] for patch in patches]
    assert tests == [{"op": "test", "path": "/metadata/resourceVersion", "value": "7"}] * 2


def test_a_storage_takes_back_its_own_marks_alone() -> None:
    theirs = {"key": TAINT, "value": "theirs", "effect": "NoSchedule"}
    marked: Manifest = {"metadata": {"resourceVersion": "7"}, "spec": {"taints": [theirs]}}
    assert untainted(marked, "ours") == []
    assert tainted(marked, "ours") == [], "once is enough to keep pods away"
    assert untainted(marked, "theirs")[1]["value"] == []
    assert owner_of("s3://a/b/") == owner_of("s3://a/b") != owner_of("s3://a/c")


def test_a_condition_keeps_the_time_at_which_it_changed() -> None:
    first, later = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    clean: Manifest = {"metadata": {"resourceVersion": "7"}, "status": {"conditions": [READY]}}
    assert conditioned(clean, None, now=first) == [], "a node that was never marked says nothing"
    once = conditioned(clean, "a step", now=first)[1]["value"]
    marked = clean | {"status": {"conditions": once}}
    assert conditioned(marked, "a step", now=later) == []
    twice = conditioned(marked, "two steps", now=later)[1]["value"]
    assert [at for at in twice if at == READY] == [READY]
    assert (twice[1]["lastTransitionTime"], twice[1]["lastHeartbeatTime"]) == (first, later)
    released = conditioned(marked, None, now=later)[1]["value"]
    assert (released[1]["status"], released[1]["lastTransitionTime"]) == ("False", later)


def test_all_pods_that_may_train_know_their_node() -> None:
    for pod in pods(render("overlays/gpu")):
        names = {variable["name"] for variable in pod.container.get("env", [])}
        is_trainer = pod.spec["serviceAccountName"] == "trainer"
        assert (KUBERNETES_NODE_VARIABLE in names) == is_trainer, pod.where
