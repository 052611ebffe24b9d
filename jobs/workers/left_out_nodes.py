"""Keeps the nodes that get no training worker any more, since one there was found wrong.

Ray Train places no worker on them. The record lies in the storage, beside the runs: a resumed run
and others on the cluster know it too.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.storage.uris import Storage, StorageError

FOLDER = "left-out"
NODE_LABEL = "ray.io/node-id"  # which Ray gives each node
KUBERNETES_NODE_VARIABLE = "RAYMILL_KUBERNETES_NODE"
"""Environment variable with the name of the node of Kubernetes, in every pod that may train."""


def leave_out(storage: Storage, place: Mapping[str, Any]) -> None:
    """Records a node: `place` has its name as `node`, its id in Ray as `node_id`, and why."""
    storage.write_bytes(f"{FOLDER}/{place['node']}.json", json.dumps(dict(place)).encode())


def left_out(storage: Storage) -> list[dict[str, Any]]:
    """Returns what is recorded of each node that is left out."""
    folder = storage.child(FOLDER)
    return [json.loads(folder.read_bytes(entry.key)) for entry in folder.list()]


def left_out_ids(storage: Storage) -> set[str]:
    """Returns the ids in Ray of the nodes that are left out; none while the storage is out of
    reach, since the launcher must not stop for it."""
    try:
        return {str(place["node_id"]) for place in left_out(storage)}
    except StorageError:
        return set()


def take_back(storage: Storage, node: str) -> bool:
    """Lets a node get workers again. Returns whether it was left out."""
    name = f"{FOLDER}/{node}.json"
    was_left_out = storage.exists(name)
    if was_left_out:
        storage.delete(name)
    return was_left_out


def selector(node_ids: Iterable[str]) -> dict[str, str]:
    """Returns the labels that a node must have to get a worker, as Ray selects by them."""
    names = sorted({*node_ids})
    return {NODE_LABEL: f"!in({','.join(names)})"} if names else {}
