"""Runs `ray start` for one node of the local cluster, so that every port it opens is on loopback.

Ray replaces a node address of 127.0.0.1 by the machine's outside address, and opens its ports there, unless it believes
that the machine cannot have several nodes (`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`); but then it refuses a second node.
Both decisions are reversed here, in this one process. Ray 2.60 has no public setting for it; a test lists the listening
sockets of a whole cluster.
"""

from ray._private import ray_constants, services
from ray.scripts.scripts import main

if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    main()
