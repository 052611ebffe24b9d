"""The RayJob that `raymill submit --kuberay` makes obeys every rule of the manifests."""

from typing import Any

import pytest
import yaml

from cluster.kube.rayjob import RUN_LABEL, rayjob, rayjob_name
from cluster.submission.preflight import AdmissionError
from tests.k8s import life_rules, network_rules, operator_rules, security_rules
from tests.k8s.kube_submission import run_config
from tests.k8s.manifests import CRDS, pods, render
from tests.k8s.schema_rules import builtin_problems, crd_problems

RULES = (*operator_rules.RULES, *security_rules.RULES, *life_rules.RULES, *network_rules.RULES)
NEEDS = {"worker_bytes": 1_000_000_000}


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "pipeline"])
def test_a_rendered_job_obeys_the_rules_of_all_manifests(overlay: str, stage: str) -> None:
    objects = render(f"overlays/{overlay}")
    scaling = {"min_workers": 1, "max_workers": 3, "use_gpu": overlay != "dev"}
    made = rayjob(objects, run_config(scaling=scaling), stage, name="run-demo-1", needs=NEEDS)
    whole = [*objects, *made]
    assert [problem for rule in RULES for problem in rule(whole)] == []
    assert builtin_problems(made) == []
    assert not CRDS.is_dir() or crd_problems(made) == []
    job, settings = made
    module = {
        "tokenize": "jobs.tokenize_corpus",
        "pretrain": "jobs.pretrain",
        "pipeline": "jobs.pipeline",
    }[stage]
    assert (
        job["spec"]["entrypoint"]
        == f"python -m cluster.stages.run_mirrored --job run-demo-1 {module} /config/run.yaml"
    )
    assert yaml.safe_load(settings["data"]["run.yaml"])["run_id"] == "Demo_1"


def test_each_pod_of_a_run_has_its_label_whatever_the_number() -> None:
    objects = render("overlays/spot")
    scaling = {"min_workers": 1, "max_workers": 3, "use_gpu": True}
    for number in (1, 12):
        name = rayjob_name("Demo_1", number)
        made = rayjob(objects, run_config(scaling=scaling), "pretrain", name=name, needs=NEEDS)
        labels = [pod.template["metadata"]["labels"][RUN_LABEL] for pod in pods(made[:1])]
        assert labels == [rayjob_name("Demo_1", 1)[:-2]] * 4, "head, spot, on demand, submitter"
        assert made[0]["metadata"]["labels"][RUN_LABEL] == labels[0]
    assert not [pod for pod in pods(objects) if RUN_LABEL in pod.template["metadata"]["labels"]]


def group(**scaling: Any) -> dict[str, Any]:
    objects = render("overlays/gpu" if scaling.get("use_gpu") else "base")
    job, _ = rayjob(objects, run_config(scaling=scaling), "pretrain", name="run-x-1", needs=NEEDS)
    (found,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return found


def test_the_group_holds_the_runs_workers() -> None:
    assert group(max_workers=4, threads_per_worker=2)["maxReplicas"] == 4
    assert group(max_workers=5, threads_per_worker=1)["maxReplicas"] == 3  # two workers a pod
    assert group(max_workers=8, threads_per_worker=4, use_gpu=True)["maxReplicas"] == 8
    with pytest.raises(AdmissionError, match="threads_per_worker=3, and the pods have 2 CPUs"):
        group(max_workers=2, threads_per_worker=3)
    with pytest.raises(
        AdmissionError, match=r"needs about 9.0 GB of memory, and the pods have 6.4 GB"
    ):
        rayjob(
            render("base"),
            run_config(),
            "pretrain",
            name="x",
            needs={"worker_bytes": 9_000_000_000},
        )


def test_names_are_kubernetes_own_and_tell_runs_apart() -> None:
    assert rayjob_name("demo", 1) == "run-demo-1"
    names = [
        rayjob_name(run_id, 12) for run_id in ("Demo_1", "demo-1", "demo.1", "x" * 64, "x" * 63)
    ]
    assert len(set(names)) == 5
    assert all(
        len(name) <= 47 and name == name.lower() and "_" not in name and "." not in name
        for name in names
    )
