"""A one-node Ray for the data stages, which the files that use it share."""

import os
from collections.abc import Iterator

import pytest

from tests.local_ray import local_ray


@pytest.fixture(scope="package")
def ray_workers(s3_server: str) -> Iterator[int]:
    """Three Ray workers that can import the stages and reach the S3 server; gives their number."""
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with local_ray(num_cpus=3, environment=keys):
        yield 3
