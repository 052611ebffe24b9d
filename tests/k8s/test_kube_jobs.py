"""`raymill submit --kuberay` makes a RayJob that obeys every rule, started once, reported and
stopped."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.output.job_log import Ended, JobLog, Started
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from cluster.stages.stage_module import HOPELESS
from cluster.storage.uris import open_storage
from cluster.submission.preflight import AdmissionError
from cluster.submission.rayjob import rayjob, rayjob_name
from tests.k8s import life_rules, network_rules, operator_rules, security_rules
from tests.k8s.api_stand_in import ApiStandIn, Fault
from tests.k8s.cluster_cli import operators_rights, stand_in
from tests.k8s.manifests import CRDS, K8S, render
from tests.k8s.operator_stand_in import OperatorStandIn
from tests.k8s.schema_rules import builtin_problems, crd_problems
from tests.time_limits import limit_s

RULES = (*operator_rules.RULES, *security_rules.RULES, *life_rules.RULES, *network_rules.RULES)
RAY, CORE = "/apis/ray.io/v1/namespaces/raymill", "/api/v1/namespaces/raymill"
NEEDS = {"worker_bytes": 1_000_000_000}


def config(**branches: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_id": "Demo_1",
        "data": {"source": "s3://raymill/corpus"},
        "model": {"preset": "tiny"},
    }
    values["scaling"] = {"min_workers": 1, "max_workers": 3}
    return validate_config(values | {"storage": {"uri": "s3://raymill"}} | branches, RunConfig)


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "pipeline"])
def test_a_rendered_job_obeys_the_rules_of_all_manifests(overlay: str, stage: str) -> None:
    objects = render(f"overlays/{overlay}")
    scaling = {"min_workers": 1, "max_workers": 3, "use_gpu": overlay != "dev"}
    made = rayjob(objects, config(scaling=scaling), stage, name="run-demo-1", needs=NEEDS)
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


def group(**scaling: Any) -> dict[str, Any]:
    objects = render("overlays/gpu" if scaling.get("use_gpu") else "base")
    job, _ = rayjob(objects, config(scaling=scaling), "pretrain", name="run-x-1", needs=NEEDS)
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
            render("base"), config(), "pretrain", name="x", needs={"worker_bytes": 9_000_000_000}
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


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStandIn]:
    with stand_in(tmp_path, monkeypatch) as api:
        yield api
        applied = {
            line.split("/namespaces/raymill/")[1].split("/")[0]
            for line in api.requests
            if "APPLY" in line
        }
        assert {(what, verb) for what in applied for verb in ("create", "patch")} <= {
            (what, verb) for _, what, verb in operators_rights()
        }


@pytest.fixture
def words(s3_bucket: str, tmp_path: Path) -> list[str]:
    """Returns the result of a submission that is accepted."""
    uri = f"s3://{s3_bucket}/store"
    open_storage(f"s3://{s3_bucket}").write_bytes("corpus/a.txt", b"words")
    values = config(data={"source": f"s3://{s3_bucket}/corpus"}, storage={"uri": uri}).model_dump(
        mode="json"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return ["submit", "pretrain", str(tmp_path / "run.yaml"), "--kuberay", "dev"]


def asked(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_is_submitted_once_told_of_stopped_and_resumed(
    api: ApiStandIn, words: list[str], s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    run = open_storage(f"s3://{s3_bucket}/store/runs/Demo_1")
    assert len(asked(capsys, *words, "--dry-run")["objects"]) == 2
    assert api.list(f"{RAY}/rayjobs")["items"] == [] and not run.list()

    first = asked(capsys, *words)
    name = first["job"]
    assert (first["new"], first["backend"], first["where"]) == (True, "kuberay", "raymill")
    job, settings = api.get(f"{RAY}/rayjobs/{name}"), api.get(f"{CORE}/configmaps/{name}")
    assert job is not None and settings is not None
    assert job["metadata"]["annotations"] == {"raymill/run-id": "Demo_1"}
    volumes = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "run-config", "configMap": {"name": name}} in volumes
    assert asked(capsys, *words)["new"] is False

    for deployment, status, state in (
        ("", "", "pending"),
        ("Initializing", "", "pending"),
        ("Suspended", "", "pending"),
        ("Running", "PENDING", "pending"),
        ("Running", "RUNNING", "running"),
        ("Retrying", "FAILED", "pending"),
    ):
        api.put(
            f"{RAY}/rayjobs/{name}",
            job | {"status": {"jobDeploymentStatus": deployment, "jobStatus": status}},
        )
        assert asked(capsys, "status", "Demo_1", *storage)["state"] == state, deployment
    assert asked(capsys, *words)["new"] is False, "one that KubeRay starts again"
    failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}
    api.put(f"{RAY}/rayjobs/{name}", job | {"status": failed})
    assert asked(capsys, "status", "Demo_1", *storage, code=1)["state"] == "failed"

    api.put(
        f"{RAY}/rayjobs/{name}",
        job | {"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}},
    )
    began_s = time.monotonic()
    stopped = asked(capsys, "stop", "Demo_1", *storage)
    assert (stopped["state"], stopped["was_live"]) == ("stopped", True)
    assert time.monotonic() - began_s < limit_s(5), "a job that is gone is not waited for"
    assert api.get(f"{RAY}/rayjobs/{name}") is None
    second = asked(capsys, *words)
    assert (second["new"], second["number"]) == (True, 2)

    # Its cluster is gone, object and all: what the job wrote is still there.
    log = JobLog(run, "20260101-000000-aaaa", Started(second["job"], "pretrain", "pod", 1.0))
    log.write(b"hello\n")
    log.close(Ended(0, False, {"loss": 1.0}, 2.0))
    api.delete(f"{RAY}/rayjobs/{second['job']}")
    told = asked(capsys, "status", "Demo_1", *storage)
    assert (told["state"], told["result"]) == ("succeeded", {"loss": 1.0})
    assert asked(capsys, "logs", "Demo_1", *storage)["lines"] == ["hello"]
    assert [row["state"] for row in asked(capsys, "list", *storage)["jobs"]] == ["succeeded"]


@pytest.mark.parametrize("reason", ["DeadlineExceeded", "JobStatusCheckTimeoutExceeded"])
def test_a_job_that_kuberay_does_not_retry_has_failed_and_is_submitted_again(
    api: ApiStandIn,
    words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    """`backoffLimit` is for a job that failed, not for one out of time or out of KubeRay's sight (a
    lost head)."""
    operator = OperatorStandIn(api)
    job = f"{RAY}/rayjobs/{asked(capsys, *words)['job']}"
    operator.look()
    if reason == "DeadlineExceeded":
        ended: dict[str, Any] = {"startTime": "2020-01-01T00:00:00Z"}
    else:
        ended = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": reason}
    api.patch(f"{job}/status", "application/merge-patch+json", {"status": ended})
    operator.look()
    found = api.get(job)
    assert found is not None and found["spec"]["backoffLimit"] > 0
    assert (found["status"]["jobDeploymentStatus"], found["status"]["reason"]) == ("Failed", reason)
    (lines,) = asked(capsys, "cluster", "status", job.rpartition("/")[2]).values()
    assert lines[0] == f"has failed ({reason})"
    assert (
        asked(capsys, "status", "Demo_1", "--storage.uri", f"s3://{s3_bucket}/store", code=1)[
            "state"
        ]
        == "failed"
    )
    again = asked(capsys, *words)
    assert (again["new"], again["number"]) == (True, 2)


def test_the_job_goes_into_another_namespace(
    api: ApiStandIn, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = asked(capsys, *words, "-n", "other", "--dry-run")["objects"]
    assert {manifest["metadata"]["namespace"] for manifest in made} == {"other"}
    own = tmp_path / "own"
    own.mkdir()
    resource = os.path.relpath(K8S / "overlays/dev", own)
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump({"namespace": "mine", "resources": [resource]})
    )
    words[-1] = str(own)
    assert main(words) == 2
    assert "the overlay's namespace is mine, not raymill: give -n mine" in capsys.readouterr().err
    assert len(asked(capsys, *words, "-n", "mine", "--dry-run")["objects"]) == 2
    api.requests.clear()


JOB, SETTINGS = "APPLY /apis/ray.io", "APPLY /api/v1"


@pytest.mark.parametrize("request_", [JOB, SETTINGS])
@pytest.mark.parametrize("fault", list(Fault))
def test_a_request_that_fails_once_is_made_again(
    api: ApiStandIn,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    request_: str,
    fault: Fault,
) -> None:
    api.faults = [(request_, fault)]
    name = asked(capsys, *words)["job"]
    assert not api.faults
    job, settings = api.get(f"{RAY}/rayjobs/{name}"), api.get(f"{CORE}/configmaps/{name}")
    assert job is not None and settings is not None
    assert settings["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


@pytest.mark.parametrize("request_", [JOB, SETTINGS])
@pytest.mark.parametrize("fault", list(Fault))
def test_a_submission_that_fails_leaves_nothing(
    api: ApiStandIn,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    request_: str,
    fault: Fault,
) -> None:
    api.faults = [(request_, fault)] * 99
    assert main(words) == 1
    assert api.list(f"{RAY}/rayjobs")["items"] == []
    assert [
        o
        for o in api.list(f"{CORE}/configmaps")["items"]
        if o["metadata"]["name"].startswith("run-")
    ] == []
    api.faults = []
    capsys.readouterr()
    again = asked(capsys, *words)
    assert (again["new"], again["number"]) == (True, 2), "the first was not taken"


def test_a_submission_that_nothing_answers_is_completed_by_the_next(
    api: ApiStandIn, words: list[str], s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job is there, its settings are not, and it cannot be removed either."""
    lost = (SETTINGS, "DELETE", f"GET {RAY}/rayjobs/run-")
    api.faults = [(request, Fault.CUT) for request in lost for _ in range(9)]
    assert main(words) == 1
    assert (
        "may be there all the same: `raymill submit` again completes it" in capsys.readouterr().err
    )
    (left,) = api.list(f"{RAY}/rayjobs")["items"]
    name = left["metadata"]["name"]
    api.faults = []
    again = asked(capsys, *words)
    assert (again["job"], again["number"], again["new"]) == (name, 1, False)
    assert (
        api.get(f"{CORE}/configmaps/{name}")["metadata"]["ownerReferences"][0]["uid"]
        == left["metadata"]["uid"]
    )
    assert asked(capsys, *words)["job"] == name, "and any number of times"
    assert (
        asked(capsys, "stop", "Demo_1", "--storage.uri", f"s3://{s3_bucket}/store")["was_live"]
        is True
    )
    assert api.list(f"{RAY}/rayjobs")["items"] == []
    assert api.get(f"{CORE}/configmaps/{name}") is None, "its owner is gone"


def test_a_job_that_no_record_names_is_found_by_its_annotation(
    api: ApiStandIn, words: list[str], s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    name = asked(capsys, *words)["job"]
    stray = api.get(f"{RAY}/rayjobs/{name}")
    assert stray is not None
    api.delete(f"{RAY}/rayjobs/{name}")
    failed = {"status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}}
    ended = stray["metadata"] | {"name": "run-demo-8"}
    api.put(f"{RAY}/rayjobs/run-demo-8", stray | failed | {"metadata": ended})
    open_storage(f"s3://{s3_bucket}/store/runs/Demo_1").delete("jobs/submitted.json")
    api.put(
        f"{RAY}/rayjobs/run-demo-9",
        stray | {"metadata": stray["metadata"] | {"name": "run-demo-9"}},
    )
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "has another job of run Demo_1, run-demo-9: `raymill stop Demo_1" in said

    api.delete(f"{RAY}/rayjobs/run-demo-9")
    second = asked(capsys, *words)["job"]
    api.put(
        f"{RAY}/rayjobs/run-demo-9",
        stray | {"metadata": stray["metadata"] | {"name": "run-demo-9"}},
    )
    asked(capsys, "stop", "Demo_1", *storage)
    left = [o["metadata"]["name"] for o in api.list(f"{RAY}/rayjobs")["items"]]
    assert left == ["run-demo-8"], f"neither {second} nor run-demo-9"


def test_a_job_without_hope_has_failed_while_kuberay_tries_it_again(
    api: ApiStandIn, words: list[str], s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    run = open_storage(f"s3://{s3_bucket}/store/runs/Demo_1")
    first = asked(capsys, *words)["job"]
    log = JobLog(run, "20260101-000000-aaaa", Started(first, "pretrain", "pod", 1.0))
    log.close(Ended(HOPELESS, False, None, 2.0))
    job = api.get(f"{RAY}/rayjobs/{first}")
    assert job is not None
    api.put(
        f"{RAY}/rayjobs/{first}",
        job | {"status": {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}},
    )
    assert asked(capsys, "status", "Demo_1", *storage, code=1)["state"] == "failed"
    second = asked(capsys, *words)
    assert (second["new"], second["number"]) == (True, 2)
    assert [o["metadata"]["name"] for o in api.list(f"{RAY}/rayjobs")["items"]] == [second["job"]]
