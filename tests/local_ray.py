"""A one-node Ray for the duration of a test: on loopback, with workers as urgent as the test, and
HOME untouched."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from cluster.local.local_cluster import PATIENT_WORKERS
from tests.repository import REPOSITORY

UNUSED = ("start_api_server", "start_log_monitor", "start_monitor")
"""Starts of processes that no test of a one-node Ray asks anything: 2 of the 8 s of processor time
of such a Ray's start."""


@contextmanager
def local_ray(
    *, num_cpus: int, environment: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[Path]:
    """Runs Ray with workers that can import the repository's modules; `environment` is added to
    theirs. Gives the folder of Ray's logs."""
    # Without a setting for authentication Ray writes a token into ~/.ray, with which every other
    # Ray of the user then starts.
    with (
        mock.patch.dict(os.environ, PATIENT_WORKERS | {"RAY_AUTH_MODE": "disabled"}),
        mock.patch.multiple("ray._private.node.Node", **dict.fromkeys(UNUSED, mock.DEFAULT)),
    ):
        for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), **(environment or {})}},
            **({"object_store_memory": 100 << 20} | settings),
        )
        try:
            yield Path(context.address_info["session_dir"]) / "logs"
        finally:
            ray.shutdown()
