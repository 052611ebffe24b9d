"""A submission to KubeRay whose requests fail is made again, or leaves nothing."""

import pytest

from cluster.cli import main
from tests.k8s.api_stand_in import ApiStandIn, Fault
from tests.k8s.cluster_cli import CORE, RAY
from tests.k8s.kube_submission import asked

pytestmark = pytest.mark.more

JOB, SETTINGS = "APPLY /apis/ray.io", "APPLY /api/v1"


@pytest.mark.parametrize("request_", [JOB, SETTINGS])
@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST, Fault.CUT])
def test_a_request_that_fails_once_is_made_again(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    capsys: pytest.CaptureFixture[str],
    request_: str,
    fault: Fault,
) -> None:
    jobs_api.faults = [(request_, fault)]
    name = asked(capsys, *submit_words)["job"]
    assert not jobs_api.faults
    job, settings = jobs_api.get(f"{RAY}/rayjobs/{name}"), jobs_api.get(f"{CORE}/configmaps/{name}")
    assert job is not None and settings is not None
    assert settings["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (SETTINGS, Fault.BUSY),
        (JOB, Fault.CUT),
        pytest.param(SETTINGS, Fault.CUT, marks=pytest.mark.more),
        pytest.param(SETTINGS, Fault.LOST, marks=pytest.mark.more),
        pytest.param(JOB, Fault.LOST, marks=pytest.mark.more),
        # The client waits as long as for the settings, and there is less to take back
        pytest.param(JOB, Fault.BUSY, marks=pytest.mark.slow),
    ],
)
def test_a_submission_that_fails_leaves_nothing(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    capsys: pytest.CaptureFixture[str],
    request_: str,
    fault: Fault,
) -> None:
    jobs_api.faults = [(request_, fault)] * 99
    assert main(submit_words) == 1
    assert jobs_api.list(f"{RAY}/rayjobs")["items"] == []
    assert [
        o
        for o in jobs_api.list(f"{CORE}/configmaps")["items"]
        if o["metadata"]["name"].startswith("run-")
    ] == []
    jobs_api.faults = []
    capsys.readouterr()
    again = asked(capsys, *submit_words)
    assert (again["new"], again["number"]) == (True, 2), "the first was not taken"


def test_a_submission_that_nothing_answers_is_completed_by_the_next(
    jobs_api: ApiStandIn,
    submit_words: list[str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The job is there, its settings are not, and it cannot be removed either."""
    lost = (SETTINGS, "DELETE", f"GET {RAY}/rayjobs/run-")
    jobs_api.faults = [(request, Fault.CUT) for request in lost for _ in range(9)]
    assert main(submit_words) == 1
    assert (
        "may be there all the same: `raymill submit` again completes it" in capsys.readouterr().err
    )
    (left,) = jobs_api.list(f"{RAY}/rayjobs")["items"]
    name = left["metadata"]["name"]
    jobs_api.faults = []
    again = asked(capsys, *submit_words)
    assert (again["job"], again["number"], again["new"]) == (name, 1, False)
    assert (
        jobs_api.get(f"{CORE}/configmaps/{name}")["metadata"]["ownerReferences"][0]["uid"]
        == left["metadata"]["uid"]
    )
    assert asked(capsys, *submit_words)["job"] == name, "and any number of times"
    assert (
        asked(capsys, "stop", "Demo_1", "--storage.uri", f"s3://{s3_bucket}/store")["was_live"]
        is True
    )
    assert jobs_api.list(f"{RAY}/rayjobs")["items"] == []
    assert jobs_api.get(f"{CORE}/configmaps/{name}") is None, "its owner is gone"
