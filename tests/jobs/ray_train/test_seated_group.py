"""The places of a group's seats, on a real cluster."""

import json
import os
import subprocess
import sys
from itertools import groupby
from typing import Any

import pytest

from cluster.local.local_cluster import LocalCluster
from tests.repository import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Two nodes with room for two workers each, and the head
PROGRAM = """
import json, sys, time
from types import SimpleNamespace
import ray
from ray.util import placement_group_table
from ray.util.placement_group import placement_group
from jobs.ray_train.seated_group import NoPlaceError, SeatPlaces, remove_leftovers

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
context = SimpleNamespace(run_config=SimpleNamespace(storage_path="a"))
asked = []

def make(seat):
    asked.append(seat)
    name = f"seats of a: {len(asked)}"
    return placement_group([{"CPU": 1}], strategy="SPREAD", name=name)

def node(seat):
    return placement_group_table(places[seat])["bundles_to_node_id"][0]

def states():
    return [row["state"] for row in placement_group_table().values()]

places = SeatPlaces(make, 4)
found = {"is_placed": places.wait(30)}
found["nodes"] = [node(seat) for seat in range(4)]
full = SeatPlaces(make, 3)  # the head has room for two
found["is_full_placed"] = full.wait(1)
full.shutdown()
places.give_up([1, 3])
places.reserve(3)
places.reserve(4)
found["later"] = [bool(node(3)), bool(node(4))]
try:
    [places.reserve(seat) for seat in (5, 6, 7)]
except NoPlaceError as error:
    found["error"] = str(error)
places.shutdown()
try:
    places.reserve(1)
except NoPlaceError as error:
    found["ended"] = str(error)
found["after"] = sorted(set(states()))
left = SeatPlaces(make, 2)
other = placement_group([{"CPU": 1}], name="another run's")
remove_leftovers(context)
found["kept"] = [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]
print(json.dumps(found))
"""


def test_seats_have_places_of_their_own() -> None:
    with LocalCluster(num_nodes=3, cpus_per_node=2) as cluster:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, cluster.address],
            env=os.environ | cluster.environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    nodes = found["nodes"]
    assert found["is_placed"]
    assert len([*groupby(nodes)]) == len({*nodes}), "those of a node are side by side"
    assert not found["is_full_placed"]
    assert found["later"] == [True, True]
    assert found["error"] == "no node has room within 5 s"
    assert found["ended"] == "the group has ended"
    assert found["after"] == ["REMOVED"]
    assert found["kept"] == ["another run's"]
