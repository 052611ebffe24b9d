"""Nodes of a local cluster, as a test disturbs them."""

import os
import re
import subprocess
import sys

import psutil

from cluster.local.local_cluster import LocalCluster
from tests.time_limits import limit_s


def processes_of_node(cluster: LocalCluster, name: str) -> list[psutil.Process]:
    node = psutil.Process(cluster._nodes[name].pid)
    return [node, *node.children(recursive=True)]


def has_raylet(cluster: LocalCluster, name: str) -> bool:
    """Reports whether the node still is one of its cluster's."""
    return any(
        process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
        for process in processes_of_node(cluster, name)
    )


def drain_node(cluster: LocalCluster, name: str, *, deadline_s: int) -> None:
    """Has the head announce that the node will be reclaimed, as a cloud's notice of preemption
    does."""
    raylet = next(p for p in processes_of_node(cluster, name) if p.name() == "raylet")
    node_id = next(
        match[1] for word in raylet.cmdline() if (match := re.fullmatch(r"--node_id=(\w+)", word))
    )
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    command += drain_words(cluster.address, node_id, deadline_s=deadline_s)
    environment = os.environ | cluster.environment
    subprocess.run(command, env=environment, check=True, timeout=limit_s(60))


def drain_words(address: str, node_id: str, *, deadline_s: int) -> list[str]:
    """Returns what is said to `ray`."""
    words = ["drain-node", "--address", address, "--node-id", node_id]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
    return [*words, "--deadline-remaining-seconds", str(deadline_s)]
