"""The commands of `raymill cluster`, and the stand-in of the Kubernetes API that they speak to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import Asked, stand_in


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStandIn]:
    with stand_in(tmp_path, monkeypatch) as api:
        yield api


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    return Asked(capsys)
