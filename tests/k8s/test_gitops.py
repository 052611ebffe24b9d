"""Other managers apply the manifests on the server's side too, as Argo CD and Flux do, and
`raymill cluster apply` goes on working."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kube.status import KINDS
from tests.k8s.api_objects import NAMESPACED, plural
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import Asked
from tests.k8s.manifests import (
    CLUSTER_KINDS,
    K8S,
    cluster_spec,
    find,
    kubectl,
    name_of,
    of_kind,
    pods,
    render,
    render_folder,
)
from tests.repository import REPOSITORY

_POLICY = "/apis/networking.k8s.io/v1/namespaces/raymill/networkpolicies/dns"
_PAGES = REPOSITORY / "docs" / "how-to"


def applied_by(api: ApiStandIn, manager: str, manifests: list[dict[str, Any]]) -> None:
    """Applies as another manager, by force only what KubeRay writes too."""
    for manifest in manifests:
        version, kind = manifest["apiVersion"], manifest["kind"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        space = "/namespaces/raymill" if kind in NAMESPACED.get(root, "").split() else ""
        path = f"{root}{space}/{plural(kind)}/{manifest['metadata']['name']}"
        force = kind in KINDS
        api.apply(path, copy.deepcopy(manifest), manager=manager, force=force, dry_run=False)


@pytest.mark.more
def test_apply_and_other_managers_take_turns_without_a_conflict(
    api: ApiStandIn, asked: Asked
) -> None:
    """Takes ten turns, of which the first makes everything."""
    manifests, managers = render("overlays/dev"), ("kubectl", "argocd-controller", "raymill")
    for turn in range(10):
        applied_by(api, managers[turn % 2], manifests)
        component = [] if turn == 0 else ["--component", "platform"]
        assert set(asked("apply", "dev", *component)) == {"applied"}
    redis = api.get("/apis/apps/v1/namespaces/raymill/statefulsets/redis")
    owners = {entry["manager"] for entry in redis["metadata"]["managedFields"]}
    assert owners == set(managers)


def test_apply_follows_kubectls_server_side_apply(
    api: ApiStandIn, asked: Asked, tmp_path: Path
) -> None:
    """Has kubectl itself apply, which the stand-in has no schemas for."""
    flags = ["--server-side", "--validate=false", "--cache-dir", str(tmp_path)]
    flags += ["-l", "app.kubernetes.io/component=platform"]
    words = [kubectl(), "apply", "-k", str(K8S / "overlays/dev"), *flags]
    subprocess.run(words, check=True)
    assert "failed" not in asked("apply", "dev", "--component", "platform")
    subprocess.run(words, check=True)
    api.requests.clear()  # which an administrator made


def test_what_another_manager_applies_otherwise_is_refused_and_leftovers_are_named(
    api: ApiStandIn, asked: Asked
) -> None:
    manifests = render("overlays/dev")
    find(manifests, "NetworkPolicy/dns")["spec"]["egress"] = [{}]
    applied_by(api, "argocd-controller", manifests)
    old = copy.deepcopy(find(manifests, "PodDisruptionBudget/pretrain-head"))
    old["metadata"]["name"] = "of-an-earlier-version"
    applied_by(api, "argocd-controller", [old])
    result = asked("apply", "dev", code=1)
    assert list(result["failed"]) == ["NetworkPolicy/dns"]
    refusal = result["failed"]["NetworkPolicy/dns"]
    assert 'conflict with "argocd-controller": .spec.egress' in refusal
    assert refusal.endswith(": change it where that one has it from")
    assert api.get(_POLICY)["spec"]["egress"] == [{}]
    assert result["leftovers"] == ["PodDisruptionBudget/of-an-earlier-version"]


def test_leftovers_are_not_asked_for_where_the_user_is_no_administrator(
    api: ApiStandIn, asked: Asked
) -> None:
    api.forbidden |= {"networkpolicies"}
    assert "leftovers" not in asked("apply", "dev", code=1)
    assert not [line for line in api.requests if "labelSelector" in line]


def blocks(page: str) -> list[dict[str, Any]]:
    """Returns the YAML that a how-to page shows."""
    text = (_PAGES / page).read_text()
    return [*map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))]


def stanza(kind: str) -> dict[str, Any]:
    """Returns the page's object of a kind."""
    (found,) = [it for it in blocks("gitops.md") if it.get("kind") == kind]
    return found


def rendered_over(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Renders an overlay of one's own over `gpu`, in a folder outside the checkout."""
    folder.mkdir()
    to_root = Path("../" * len(folder.resolve().parts[1:]))
    base = str(to_root / str(K8S)[1:] / "overlays/gpu")
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base]} | settings))
    return render_folder(folder)


def test_the_pages_stanzas_render_what_they_promise(tmp_path: Path) -> None:
    """Gives the patches of Argo CD's and of Flux' stanza to kustomize, as both of them do."""
    argos = stanza("Application")["spec"]["source"]["kustomize"]["patches"]
    fluxs = stanza("Kustomization")["spec"]["patches"]
    for number, (patches, mark) in enumerate(
        (
            (argos, {"argocd.argoproj.io/sync-options": "Prune=false"}),
            (fluxs, {"kustomize.toolkit.fluxcd.io/prune": "disabled"}),
        )
    ):
        objects = rendered_over(tmp_path / str(number), {"patches": patches})
        settings_maps = of_kind(objects, "ConfigMap")
        assert settings_maps
        for manifest in settings_maps:
            assert mark.items() <= manifest["metadata"]["annotations"].items()
        assert not of_kind(objects, "RayJob")
        kept = {name_of(it) for it in render("overlays/gpu") if it["kind"] != "RayJob"}
        assert {name_of(manifest) for manifest in objects} == kept


def test_argo_ignores_what_the_autoscaler_and_scale_write() -> None:
    ignored = stanza("Application")["spec"]["ignoreDifferences"]
    assert {(entry["group"], entry["kind"]) for entry in ignored} == {
        ("ray.io", kind) for kind in CLUSTER_KINDS if kind != "RayJob"
    }
    for entry in ignored:
        inside = {"RayService": ".spec.rayClusterConfig"}.get(entry["kind"], ".spec")
        assert entry["jqPathExpressions"] == [
            f"{inside}.workerGroupSpecs[]?.{field}"
            for field in ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
        ]
        manifest = next(it for it in render("base") if it["kind"] == entry["kind"])
        assert cluster_spec(manifest)["workerGroupSpecs"], "the path is not of the manifests"


def test_the_labels_of_upkeep_reach_every_pod_and_no_selector(tmp_path: Path) -> None:
    (settings,) = blocks("upkeep.md")
    objects = rendered_over(tmp_path / "cost", settings)
    labelled = [*pods(objects)]
    assert len(labelled) == len([*pods(render("overlays/gpu"))])
    for pod in labelled:
        assert pod.template["metadata"]["labels"]["cost-center"] == "4711", pod.where
    selector = find(objects, "StatefulSet/redis")["spec"]["selector"]["matchLabels"]
    assert selector == {"raymill/role": "redis"}
