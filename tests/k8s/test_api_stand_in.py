"""The stand-in for the API behaves, as far as `raymill cluster` needs, as Kubernetes 1.36 with
KubeRay's CRDs did."""

from typing import Any

import pytest
import yaml

from tests.k8s.api_objects import GROUP_DEFAULTS, RAY_DEFAULTS, ApiObjects, RefusedError
from tests.k8s.manifests import CRDS, find, render
from tests.k8s.operator_stand_in import OperatorStandIn

SHARED = "/apis/ray.io/v1/namespaces/raymill/rayclusters/shared"
JSON_PATCH = "application/json-patch+json"


@pytest.fixture
def api() -> ApiObjects:
    api = ApiObjects()
    for name in ("ray-head", "serving-head"):
        account = {"kind": "ServiceAccount", "metadata": {"name": name}}
        api.put(f"/api/v1/namespaces/raymill/serviceaccounts/{name}", account)
    return api


def applied(api: ApiObjects, manifest: dict[str, Any], **settings: Any) -> dict[str, Any]:
    options = {"manager": "raymill", "force": False, "dry_run": False} | settings
    return api.apply(SHARED, manifest, **options)


@pytest.fixture
def shared() -> dict[str, Any]:
    return find(render("base"), "RayCluster/shared")


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not beside the checkout")
def test_its_defaults_are_those_of_the_crds() -> None:
    for kind, defaults in RAY_DEFAULTS.items():
        definition = yaml.load(
            (CRDS / f"ray.io_{kind.lower()}s.yaml").read_bytes(), Loader=yaml.CSafeLoader
        )
        (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
        assert version["subresources"] == {"status": {}}
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        assert defaults == {key: item["default"] for key, item in spec.items() if "default" in item}
        inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(kind)
        groups = (spec[inside]["properties"] if inside else spec)["workerGroupSpecs"]
        assert "x-kubernetes-list-type" not in groups, "the list is atomic"
        fields = groups["items"]["properties"]
        assert {
            key: item["default"] for key, item in fields.items() if "default" in item
        } == GROUP_DEFAULTS


def test_an_apply_is_repeated_until_somebody_else_writes(
    api: ApiObjects, shared: dict[str, Any]
) -> None:
    made = applied(api, shared)
    assert made["spec"]["workerGroupSpecs"][0]["replicas"] == 0, "a default"
    assert applied(api, shared)["metadata"]["uid"] == made["metadata"]["uid"]
    OperatorStandIn(api).look()
    with pytest.raises(RefusedError) as refused:
        applied(api, shared)
    assert refused.value.code == 409
    assert (
        'Apply failed with 1 conflict: conflict with "kuberay-operator" using ray.io/v1: .spec.workerGroupSpecs'
        in str(refused.value)
    )
    taken = applied(api, shared, force=True)
    owners = {
        m["manager"]
        for m in taken["metadata"]["managedFields"]
        if "f:workerGroupSpecs" in m["fieldsV1"].get("f:spec", {})
    }
    assert owners == {"raymill"}
    assert "scaleStrategy" not in taken["spec"]["workerGroupSpecs"][0]


def test_a_patch_takes_the_list_that_it_writes_in(api: ApiObjects, shared: dict[str, Any]) -> None:
    applied(api, shared)
    change = [{"op": "replace", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 9}]
    api.patch(SHARED, JSON_PATCH, change, manager="OpenAPI-Generator")
    with pytest.raises(RefusedError, match='conflict with "OpenAPI-Generator"'):
        applied(api, shared)


def test_two_who_apply_the_same_share_it_and_what_one_drops_goes(
    api: ApiObjects, shared: dict[str, Any]
) -> None:
    applied(api, shared)
    part = {key: shared[key] for key in ("apiVersion", "kind", "metadata")}
    part["spec"] = {"rayVersion": shared["spec"]["rayVersion"]}
    applied(api, part, manager="kubectl")
    queued = shared | {"spec": shared["spec"] | {"suspend": True}}
    assert applied(api, queued)["spec"]["suspend"] is True
    unversioned = shared | {
        "spec": {key: item for key, item in shared["spec"].items() if key != "rayVersion"}
    }
    after = applied(api, unversioned)["spec"]
    assert "suspend" not in after
    assert after["rayVersion"] == shared["spec"]["rayVersion"], "it is kubectl's too"


def test_an_apply_of_an_old_version_is_refused(api: ApiObjects, shared: dict[str, Any]) -> None:
    version = applied(api, shared)["metadata"]["resourceVersion"]
    OperatorStandIn(api).look()
    stale = shared | {"metadata": shared["metadata"] | {"resourceVersion": version}}
    with pytest.raises(RefusedError, match="the object has been modified"):
        applied(api, stale, force=True)


def test_a_status_is_written_as_a_subresource_only(api: ApiObjects, shared: dict[str, Any]) -> None:
    generation = applied(api, shared)["metadata"]["generation"]
    api.patch(SHARED, "application/merge-patch+json", {"status": {"state": "ready"}})
    assert "status" not in api.get(SHARED)
    api.patch(
        f"{SHARED}/status",
        "application/merge-patch+json",
        {"status": {"state": "ready"}, "spec": {"suspend": True}},
    )
    assert api.get(SHARED)["status"] == {"state": "ready"}
    assert "suspend" not in api.get(SHARED)["spec"]
    assert api.get(SHARED)["metadata"]["generation"] == generation
    assert applied(api, shared)["status"] == {"state": "ready"}


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not beside the checkout")
def test_an_unknown_field_is_refused(api: ApiObjects, shared: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="replica' was unexpected"):
        applied(api, shared | {"spec": shared["spec"] | {"replica": 1}})


def test_a_namespace_must_be_there_also_for_a_dry_run(shared: dict[str, Any]) -> None:
    api = ApiObjects(namespaces=())
    with pytest.raises(RefusedError, match='namespaces "raymill" not found') as refused:
        applied(api, shared, dry_run=True)
    assert refused.value.code == 404


def test_a_dry_run_changes_nothing(api: ApiObjects, shared: dict[str, Any]) -> None:
    assert applied(api, shared, dry_run=True)["spec"]["rayVersion"] == shared["spec"]["rayVersion"]
    assert api.get(SHARED) is None


def test_a_services_cluster_is_not_told_of_new_bounds(api: ApiObjects) -> None:
    operator, path = (
        OperatorStandIn(api),
        "/apis/ray.io/v1/namespaces/raymill/rayservices/completions",
    )
    service = find(render("base"), "RayService/completions")
    api.apply(path, service, manager="raymill", force=False, dry_run=False)
    operator.look()
    active = api.get(path)["status"]["activeServiceStatus"]["rayClusterName"]
    before = api.get(f"{SHARED.rpartition('/')[0]}/{active}")
    bounds = [
        {
            "op": "replace",
            "path": "/spec/rayClusterConfig/workerGroupSpecs/0/maxReplicas",
            "value": 9,
        }
    ]
    api.patch(path, JSON_PATCH, bounds)
    operator.look()
    assert api.get(f"{SHARED.rpartition('/')[0]}/{active}")["spec"] == before["spec"]
    image = [{"op": "replace", "path": "/spec/rayClusterConfig/rayVersion", "value": "2.60.1"}]
    api.patch(path, JSON_PATCH, image)
    operator.look()
    assert api.get(path)["status"]["activeServiceStatus"]["rayClusterName"] != active


def test_what_an_object_owns_goes_with_it(api: ApiObjects, shared: dict[str, Any]) -> None:
    applied(api, shared)
    OperatorStandIn(api).look()
    assert api.list("/api/v1/namespaces/raymill/pods")["items"]
    api.patch(SHARED, JSON_PATCH, [{"op": "remove", "path": "/metadata/finalizers"}])
    api.delete(SHARED)
    assert not api.list("/api/v1/namespaces/raymill/pods")["items"]


def test_what_has_a_finalizer_goes_once_that_is_removed_and_its_namespace_with_it(
    api: ApiObjects, shared: dict[str, Any]
) -> None:
    applied(api, shared)
    OperatorStandIn(api).look()
    api.delete("/api/v1/namespaces/raymill")
    assert "deletionTimestamp" in api.get(SHARED)["metadata"]
    assert "deletionTimestamp" in api.get("/api/v1/namespaces/raymill")["metadata"]
    api.patch(SHARED, JSON_PATCH, [{"op": "remove", "path": "/metadata/finalizers"}])
    assert api.get(SHARED) is None
    assert api.get("/api/v1/namespaces/raymill") is None
