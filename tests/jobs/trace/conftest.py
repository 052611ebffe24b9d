"""One run for the files of this folder."""

import pytest

from jobs.run.run_plan import RunPlan
from tests.jobs.planted_runs import disturbed_run


@pytest.fixture(scope="package")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return disturbed_run(tmp_path_factory.mktemp("traced"))
