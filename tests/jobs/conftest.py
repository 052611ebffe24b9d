"""A one-node Ray cluster for the data stages."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_workers(s3_server: str) -> Iterator[int]:
    """Three Ray workers that can import the stages and reach the S3 server; gives their number."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        environment = {"PYTHONPATH": str(REPOSITORY)}
        environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            runtime_env={"env_vars": environment},
        )
        yield 3
        ray.shutdown()
