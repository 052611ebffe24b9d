"""Nodes that get no training worker any more."""

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.storage.uris import open_storage
from jobs.workers.left_out_nodes import leave_out, left_out, left_out_ids, selector, take_back

PLACE = {"node": "node-1", "node_id": "ab12", "reason": "step 7: it was wrong", "step": 7}


def test_a_node_is_left_out_until_it_is_taken_back(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert left_out_ids(storage) == set()
    leave_out(storage, PLACE)
    assert left_out(storage) == [PLACE]
    assert left_out_ids(storage) == {"ab12"}
    assert take_back(storage, "node-1")
    assert not take_back(storage, "node-1")
    assert left_out_ids(storage) == set()


def test_a_storage_out_of_reach_leaves_nobody_out() -> None:
    assert left_out_ids(open_storage("s3://no-such-bucket-anywhere/x")) == set()


def test_workers_are_placed_on_the_other_nodes() -> None:
    assert selector(["b", "a", "b"]) == {"ray.io/node-id": "!in(a,b)"}
    assert selector([]) == {}


def test_the_command_lists_them_and_lets_one_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out(open_storage(str(tmp_path)), PLACE)
    where = ["--storage.uri", str(tmp_path)]
    assert main(["cluster", "release", *where]) == 0
    assert "step 7: it was wrong" in capsys.readouterr().out
    assert main(["cluster", "release", "node-2", *where]) != 0
    assert "node-1" in capsys.readouterr().err
    assert main(["cluster", "release", "node-1", *where]) == 0
    assert main(["cluster", "release", *where]) == 0
    assert "no node is left out" in capsys.readouterr().out
