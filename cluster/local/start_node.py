"""Runs `ray start` for one node of the local cluster, so that every port it opens is on loopback.

Ray replaces a node address of 127.0.0.1 by the machine's outside address, and opens its ports
there, unless it believes that the machine cannot have several nodes
(`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`); but then it refuses a second node. Both decisions are
reversed here, in this one process. A head also gets no server of Ray Client, which nothing here
uses and whose start takes a second of processor time. And Ray gives a raylet 30 s to come, which
busy cores make too few: it has longer, unless it has ended. Ray 2.60 has no public setting for any
of this; a test lists the listening sockets of a whole cluster.
"""

import os
import sys
import time
from typing import Any

# `ray` goes without the subcommands that it cannot import. These, with all of Ray Serve, took 1.3
# of the 1.9 s of processor time after which a node's start began.
for _name in ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli"):
    sys.modules[_name] = None  # type: ignore[assignment]

from ray._private import ray_constants, services  # noqa: E402
from ray.scripts import scripts  # noqa: E402

_START_S = 100.0  # within which a node is there, or is not coming

_get_node = services.get_node


def _patient_get_node(*arguments: Any) -> Any:
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            return _get_node(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline_s or _has_lost_a_process():
                raise
            time.sleep(0.1)


def _has_lost_a_process() -> bool:
    """Reports whether a process that was started here has ended, as a raylet does that waits 15 s
    for its agent in vain. False where the system cannot tell."""
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # there is none
        return False


if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    services.get_node = _patient_get_node
    scripts.get_ray_client_dependency_error = lambda: ImportError("not used")
    scripts.main()
