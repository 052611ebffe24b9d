"""The stand-in of the Kubernetes API, and the commands that speak to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import Asked, operators_rights, stand_in
from tests.k8s.kube_submission import submission


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStandIn]:
    with stand_in(tmp_path, monkeypatch) as api:
        yield api


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    return Asked(capsys)


@pytest.fixture
def jobs_api(api: ApiStandIn) -> Iterator[ApiStandIn]:
    """An API of which what is applied, too, is an operator's right."""
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
def submit_words(s3_bucket: str, tmp_path: Path) -> list[str]:
    return submission(s3_bucket, tmp_path)
