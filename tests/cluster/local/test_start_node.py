"""A node has long to start on busy cores, but one whose process has ended is not waited for."""

import os
import subprocess
import sys

from tests.repository import REPOSITORY
from tests.time_limits import limit_s

WAIT = """
import subprocess
import sys

from ray._private import services

tries = []


def get_node(address, node_id):
    tries.append(node_id)
    if len(tries) < 4:
        raise RuntimeError("no such node")
    return "a node"


services.get_node = get_node
from cluster.local import start_node

start_node._START_S = 1e9
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
if child.args == ["true"]:
    while not start_node._has_lost_a_process():
        pass
try:
    print(start_node._patient_get_node("address", "id"), len(tries))
except RuntimeError as error:
    print(error, len(tries))
child.communicate()
"""


def outcome(*command: str) -> str:
    """Returns what the wait for a node came to beside a process of this command."""
    done = subprocess.run(
        [sys.executable, "-c", WAIT, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=limit_s(30),
        check=True,
    )
    return done.stdout.strip()


def test_a_node_is_waited_for_while_its_processes_live() -> None:
    assert outcome("cat") == "a node 4"


def test_a_node_whose_process_has_ended_is_not_waited_for() -> None:
    assert outcome("true") == "no such node 1"
