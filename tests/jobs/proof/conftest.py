"""A real run, which each test may spoil."""

import shutil
from pathlib import Path

import pytest

from cluster.storage.uris import Storage, open_storage
from tests.jobs.runs import trained_run


@pytest.fixture(scope="session")
def storage_uri(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    trained_run(str(folder))
    return folder


@pytest.fixture
def run(storage_uri: Path, tmp_path: Path) -> Storage:
    """A copy of a run of eight steps, with checkpoints at 3, 6 and 8, to be spoiled."""
    shutil.copytree(storage_uri, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")
