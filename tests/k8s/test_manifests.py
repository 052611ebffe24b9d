"""Every object of every kustomization fits the schemas, the operator's rules, the checklist and the code it starts."""

from pathlib import Path

import pytest
from ray import serve

from serving.app import build_app
from tests.k8s import life_rules, network_rules, operator_rules, run_rules, security_rules
from tests.k8s.manifests import (
    CLUSTER_KINDS,
    CRDS,
    KUSTOMIZATIONS,
    Rule,
    cluster_spec,
    find,
    name_of,
    of_kind,
    pods,
    ray_pods,
    render,
)
from tests.k8s.schema_rules import builtin_problems, crd_problems

QUEUE = "kueue.x-k8s.io/queue-name"
RULES = (*operator_rules.RULES, *security_rules.RULES, *life_rules.RULES, *network_rules.RULES, *run_rules.RULES)

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
    assert len(list(pods(objects))) == 14  # a head and a group each, the jobs' submitters, and Redis


def test_gpu_trainers_go_from_none_to_the_runs_workers() -> None:
    objects = render("overlays/gpu")
    (group,) = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["minReplicas"], group["maxReplicas"], limits["nvidia.com/gpu"]) == (0, 8, "1")
    assert run_rules.run_config(objects).scaling.max_workers == 8


def test_spot_moves_the_trainers_only() -> None:
    on_spot = [pod.where for pod in ray_pods(render("overlays/spot")) if "nodeSelector" in pod.spec]
    assert on_spot == ["RayJob/pretrain group trainers"]


def test_kueue_holds_every_job_until_there_is_room() -> None:
    objects = render("overlays/kueue")
    queued = {name_of(o): o["spec"].get("suspend") for o in objects if QUEUE in o["metadata"]["labels"]}
    assert queued == {name_of(o): True for o in of_kind(objects, "RayCluster", "RayJob")}


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_endpoint_builds_from_its_manifest(kustomization: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a key\n")
    config = run_rules.serve_config(find(render(kustomization), "RayService/completions"))
    app = build_app(config.model_copy(update={"api_key_file": str(keys)}))
    assert isinstance(app, serve.Application)
