"""A RayJob of `raymill submit --kuberay` is started once, reported, stopped and found again."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.output.job_log import Ended, JobLog, Started
from cluster.stages.stage_module import HOPELESS
from cluster.storage.uris import open_storage
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import CORE, RAY
from tests.k8s.kube_submission import asked
from tests.k8s.manifests import K8S
from tests.k8s.operator_stand_in import OperatorStandIn
from tests.time_limits import limit_s

pytestmark = pytest.mark.more


def test_a_run_is_submitted_once_told_of_stopped_and_resumed(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    run = open_storage(f"s3://{s3_bucket}/store/runs/Demo_1")
    assert len(asked(capsys, *submit_words, "--dry-run")["objects"]) == 2
    assert jobs_api.list(f"{RAY}/rayjobs")["items"] == [] and not run.list()

    first = asked(capsys, *submit_words)
    name = first["job"]
    assert (first["new"], first["backend"], first["where"]) == (True, "kuberay", "raymill")
    job, settings = jobs_api.get(f"{RAY}/rayjobs/{name}"), jobs_api.get(f"{CORE}/configmaps/{name}")
    assert job is not None and settings is not None
    assert job["metadata"]["annotations"] == {"raymill/run-id": "Demo_1"}
    volumes = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "run-config", "configMap": {"name": name}} in volumes
    assert asked(capsys, *submit_words)["new"] is False

    for deployment, status, state in (
        ("", "", "pending"),
        ("Initializing", "", "pending"),
        ("Suspended", "", "pending"),
        ("Running", "PENDING", "pending"),
        ("Running", "RUNNING", "running"),
        ("Retrying", "FAILED", "pending"),
    ):
        jobs_api.put(
            f"{RAY}/rayjobs/{name}",
            job | {"status": {"jobDeploymentStatus": deployment, "jobStatus": status}},
        )
        assert asked(capsys, "status", "Demo_1", *storage)["state"] == state, deployment
    assert asked(capsys, *submit_words)["new"] is False, "one that KubeRay starts again"
    failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}
    jobs_api.put(f"{RAY}/rayjobs/{name}", job | {"status": failed})
    assert asked(capsys, "status", "Demo_1", *storage, code=1)["state"] == "failed"

    jobs_api.put(
        f"{RAY}/rayjobs/{name}",
        job | {"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}},
    )
    began_s = time.monotonic()
    stopped = asked(capsys, "stop", "Demo_1", *storage)
    assert (stopped["state"], stopped["was_live"]) == ("stopped", True)
    assert time.monotonic() - began_s < limit_s(5), "a job that is gone is not waited for"
    assert jobs_api.get(f"{RAY}/rayjobs/{name}") is None
    second = asked(capsys, *submit_words)
    assert (second["new"], second["number"]) == (True, 2)

    # Its cluster is gone, object and all: what the job wrote is still there.
    log = JobLog(run, "20260101-000000-aaaa", Started(second["job"], "pretrain", "pod", 1.0))
    log.write(b"hello\n")
    log.close(Ended(0, False, {"loss": 1.0}, 2.0))
    jobs_api.delete(f"{RAY}/rayjobs/{second['job']}")
    told = asked(capsys, "status", "Demo_1", *storage)
    assert (told["state"], told["result"]) == ("succeeded", {"loss": 1.0})
    assert asked(capsys, "logs", "Demo_1", *storage)["lines"] == ["hello"]
    assert [row["state"] for row in asked(capsys, "list", *storage)["jobs"]] == ["succeeded"]


@pytest.mark.parametrize("reason", ["DeadlineExceeded", "JobStatusCheckTimeoutExceeded"])
def test_a_job_that_kuberay_does_not_retry_has_failed_and_is_submitted_again(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    """`backoffLimit` is for a job that failed, not for one out of time or out of KubeRay's sight (a
    lost head)."""
    operator = OperatorStandIn(jobs_api)
    job = f"{RAY}/rayjobs/{asked(capsys, *submit_words)['job']}"
    operator.look()
    if reason == "DeadlineExceeded":
        ended: dict[str, Any] = {"startTime": "2020-01-01T00:00:00Z"}
    else:
        ended = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": reason}
    jobs_api.patch(f"{job}/status", "application/merge-patch+json", {"status": ended})
    operator.look()
    found = jobs_api.get(job)
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
    again = asked(capsys, *submit_words)
    assert (again["new"], again["number"]) == (True, 2)


def test_the_job_goes_into_another_namespace(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = asked(capsys, *submit_words, "-n", "other", "--dry-run")["objects"]
    assert {manifest["metadata"]["namespace"] for manifest in made} == {"other"}
    own = tmp_path / "own"
    own.mkdir()
    resource = os.path.relpath(K8S / "overlays/dev", own)
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump({"namespace": "mine", "resources": [resource]})
    )
    submit_words[-1] = str(own)
    assert main(submit_words) == 2
    assert "the overlay's namespace is mine, not raymill: give -n mine" in capsys.readouterr().err
    assert len(asked(capsys, *submit_words, "-n", "mine", "--dry-run")["objects"]) == 2
    jobs_api.requests.clear()


def test_a_job_that_no_record_names_is_found_by_its_annotation(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    name = asked(capsys, *submit_words)["job"]
    stray = jobs_api.get(f"{RAY}/rayjobs/{name}")
    assert stray is not None
    jobs_api.delete(f"{RAY}/rayjobs/{name}")
    failed = {"status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}}
    ended = stray["metadata"] | {"name": "run-demo-8"}
    jobs_api.put(f"{RAY}/rayjobs/run-demo-8", stray | failed | {"metadata": ended})
    open_storage(f"s3://{s3_bucket}/store/runs/Demo_1").delete("jobs/submitted.json")
    jobs_api.put(
        f"{RAY}/rayjobs/run-demo-9",
        stray | {"metadata": stray["metadata"] | {"name": "run-demo-9"}},
    )
    assert main(submit_words) == 1
    said = capsys.readouterr().err
    assert "has another job of run Demo_1, run-demo-9: `raymill stop Demo_1" in said

    jobs_api.delete(f"{RAY}/rayjobs/run-demo-9")
    second = asked(capsys, *submit_words)["job"]
    jobs_api.put(
        f"{RAY}/rayjobs/run-demo-9",
        stray | {"metadata": stray["metadata"] | {"name": "run-demo-9"}},
    )
    asked(capsys, "stop", "Demo_1", *storage)
    left = [o["metadata"]["name"] for o in jobs_api.list(f"{RAY}/rayjobs")["items"]]
    assert left == ["run-demo-8"], f"neither {second} nor run-demo-9"


def test_a_job_without_hope_has_failed_while_kuberay_tries_it_again(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    run = open_storage(f"s3://{s3_bucket}/store/runs/Demo_1")
    first = asked(capsys, *submit_words)["job"]
    log = JobLog(run, "20260101-000000-aaaa", Started(first, "pretrain", "pod", 1.0))
    log.close(Ended(HOPELESS, False, None, 2.0))
    job = jobs_api.get(f"{RAY}/rayjobs/{first}")
    assert job is not None
    jobs_api.put(
        f"{RAY}/rayjobs/{first}",
        job | {"status": {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}},
    )
    assert asked(capsys, "status", "Demo_1", *storage, code=1)["state"] == "failed"
    second = asked(capsys, *submit_words)
    assert (second["new"], second["number"]) == (True, 2)
    assert [o["metadata"]["name"] for o in jobs_api.list(f"{RAY}/rayjobs")["items"]] == [
        second["job"]
    ]
