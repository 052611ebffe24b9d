"""Checkpoints in shards: what one world saves any other resumes, with the bits of one worker, and
crashes cost nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage.folder import LocalStorage
from cluster.storage.uris import Entry, open_storage
from jobs.export import export
from jobs.proof.verify_run import verify
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.ledger import Ledger
from jobs.run.sharded_checkpoints import ShardedCheckpoint, stored_state
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import MANIFEST, read_metadata
from model.files.hf_config import read_config
from model.shapes import parameter_shapes
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.adamw import AdamW
from raymill.state.flat_layout import FlatLayout
from raymill.state.stored_state import stored_name
from tests.checkpoints import write_tiny
from tests.fault_seeds import fault_seeds
from tests.jobs.sharded_runs import NUM_STEPS, STAGES
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.more

PARTS = ("values", *AdamW.vectors)
OF_SHARDS = {"mid_shard", "after_shard", "before_manifest", "after_manifest", "mid_delete"}
PLACES = OF_SHARDS | {"before_file", "mid_file", "before_fsync", "after_file", "after_lease"}


def run(
    storage_uri: str, folder: Path, *, seeds: Sequence[int] = (), places: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(REPOSITORY)}
    tokens_in = str(folder / "tokens") if seeds else storage_uri
    arguments = [storage_uri, tokens_in, str(folder), json.dumps([*seeds]), *places]
    command = [sys.executable, "-m", "tests.jobs.sharded_runs", *arguments]
    timeout_s = limit_s(120 * (1 + len(seeds) * len(places)))
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        check=True,
        timeout=timeout_s,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("is_remote", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_world_resumes_what_any_other_saved(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    uri = f"s3://{s3_bucket}/storage" if is_remote else str(tmp_path / "storage")
    undisturbed, resized = run(uri, tmp_path)
    assert {*undisturbed["codes"], *resized["codes"]} == {0}
    runs = [open_storage(uri).child(f"runs/{name}") for name in ("undisturbed", "resized")]
    expected, found = (
        [line["parameter_hash"] for line in Ledger.read(of).events("checkpoint")] for of in runs
    )
    assert found == expected
    assert len(found) == NUM_STEPS // 2
    states, resized_states = (
        [line["state_hash"] for line in Ledger.read(of).events("checkpoint")] for of in runs
    )
    assert states == resized_states
    assert len({*states}) == NUM_STEPS // 2
    assert [line["loss"] for line in Ledger.read(runs[0]).steps] == [
        line["loss"] for line in Ledger.read(runs[1]).steps
    ]
    checked = verify(runs[1])
    assert checked["problems"] == []
    assert checked["checkpoints"] == NUM_STEPS // 2
    checkpoints = RunCheckpoints(runs[1])
    for name, (world_size, shard, group), recorded in zip(
        checkpoints.names, STAGES, expected, strict=True
    ):
        folder = checkpoints.fetch(name, tmp_path / "fetched")
        count = (group or world_size) if shard != "none" else 0
        assert sum("-shard-" in path.name for path in folder.iterdir()) == 2 * count
        assert not any(path.name.startswith("report-") for path in folder.iterdir()), (
            "reports are gone"
        )
        assert (
            parameter_hash(load_model(folder).state_dict())
            == recorded
            == read_metadata(folder).parameter_hash
        )
    shapes = parameter_shapes(read_config(folder))
    layout = FlatLayout.of(shapes)
    for copied, (world_size, shard, group) in zip(resized["copied"], STAGES, strict=True):
        count = (group or world_size) if shard != "none" else 1
        shares = [12 * layout.parts(rank, world_size=count).num_values for rank in range(count)]
        assert {(rank, num_bytes) for rank, num_bytes in copied} == {*enumerate(shares)}, (
            "each its own share, no more"
        )
    shapes_of_all = {"step": ()} | {
        stored_name(part, name): shapes[name] for part in PARTS for name in shapes
    }
    for names in zip(*(RunCheckpoints(each).names for each in runs), strict=True):
        unsharded, tensors = (
            stored_state(RunCheckpoints(each), name).whole(shapes_of_all)
            for each, name in zip(runs, names, strict=True)
        )
        assert all(torch.equal(tensors[key], unsharded[key]) for key in shapes_of_all), (
            "what a resume restores"
        )
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)  # its cache
    copies = []
    for name in checkpoints.names:
        target = tmp_path / "copies" / name
        exported = export(checkpoints.uri(name), str(target), storage_uri=uri)
        assert exported["parameter_hash"] == expected[step_of(name) // 2 - 1]
        copies.append({path.name for path in target.iterdir()})
    assert all(copy == copies[0] for copy in copies)


def check_crashes(
    storage_uri: str, folder: Path, *, seeds: Sequence[int], places: set[str]
) -> None:
    undisturbed, *crashed = run(storage_uri, folder, seeds=seeds, places=tuple(sorted(places)))
    assert undisturbed["codes"] == [0]
    expected = Ledger.read(open_storage(storage_uri).child("runs/undisturbed")).events(
        "checkpoint"
    )[-1]
    for crash in crashed:
        print(crash)
        assert crash["codes"][crash["rank"]] == 137
        assert crash["codes"][1 - crash["rank"]] == 1 or crash["complete"] == NUM_STEPS, (
            "it lost the other one"
        )
        assert {*crash["ended"]} == {0}
        assert crash["damaged"] == []
        assert crash["complete"] <= crash["went_on_from"]
        assert crash["went_on_from"] % 2 == 0
        assert crash["steps"], "the ledger has each step: no checkpoint was ahead of it"
        assert crash["hash"] == expected["parameter_hash"]
        assert crash["left"] == []
        assert [path for path in crash["spooled"] if "step-" in path] == []
    assert {crash["failpoint"] for crash in crashed} == places
    assert any(crash["went_on_from"] > 0 for crash in crashed)


@pytest.mark.more
def test_a_crash_of_one_worker(tmp_path: Path) -> None:
    check_crashes(str(tmp_path / "storage"), tmp_path, seeds=[0], places=OF_SHARDS)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_crash_of_one_worker__at_every_place(
    s3_bucket: str, tmp_path: Path, is_remote: bool
) -> None:
    uri = f"s3://{s3_bucket}/storage" if is_remote else str(tmp_path / "storage")
    check_crashes(uri, tmp_path, seeds=fault_seeds(2), places=PLACES)


def test_a_listing_whose_first_page_is_older_than_the_last_report_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ShardedCheckpoint(
        RunCheckpoints(open_storage(str(tmp_path))), "step-000000001-0001", 1
    )
    spooled = tmp_path / "spooled"
    spooled.mkdir()
    file = checkpoint.file("model.safetensors", 0)
    (spooled / file).write_bytes(b"weights")
    report = {file: {"size": 7}}
    list_all, pages_behind = LocalStorage.list, 1

    def listed(self: LocalStorage, prefix: str = "") -> list[Entry]:
        nonlocal pages_behind
        is_behind, pages_behind = pages_behind > 0, pages_behind - 1
        return [entry for entry in list_all(self, prefix) if not is_behind or entry.key != file]

    checkpoint.store(0, spooled, report)
    monkeypatch.setattr(LocalStorage, "list", listed)
    assert checkpoint.reports() == [report]
    pages_behind = 2
    assert checkpoint.reports() == [{"refused": f"{file} did not arrive whole"}], "it is gone"


def test_a_copy_that_only_computes_trains_nothing(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    folder = tmp_path / "checkpoints/step-000000003"
    write_tiny(folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["files"]["train_state.safetensors"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"has no train_state\.safetensors: training can't continue from it"
    ):
        stored_state(RunCheckpoints(run), folder.name)
