"""Corruption costs a run one checkpoint at most: it is told of, kept aside and passed over."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.storage.uris import Storage
from jobs.exact.stored_state import DamagedStateError
from jobs.pretrain import unfinished
from jobs.run.checkpoints import QUARANTINED, RunCheckpoints, step_of
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.saving import checkpoint_writer
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.publisher import read_back
from jobs.training.train_loop import train
from model.files.checkpoint_folder import Metadata
from model.files.state_hash import COUNT
from raymill.files.stored_tensors import StoredTensors
from raymill.phases import Phase
from raymill.state.host_copies import HostCopies, Take
from tests.checkpoints import damage
from tests.jobs.failpoint_runs import save_and_wait
from tests.jobs.runs import final_hash, tiny_plan

pytestmark = pytest.mark.more


def stopped(plan: RunPlan, tmp_path: Path) -> Storage:
    """The run after eight steps that saved at 2, 4, 6 and 8, as a kill before its `finish` leaves
    it."""
    train(plan, rank=0, world_size=1)
    content = plan.run.read_bytes("ledger.jsonl")
    plan.run.write_bytes(
        "ledger.jsonl",
        b"".join(line for line in content.splitlines(True) if b'"finish"' not in line),
    )
    return plan.run


def eight_steps(tmp_path: Path, *, save_every_steps: int = 4) -> RunPlan:
    return tiny_plan(
        str(tmp_path), checkpoint={"save_every_steps": save_every_steps, "num_to_keep": 9}
    )


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "no manifest", "garbled manifest"])
def test_a_corrupt_newest_is_marked_told_of_and_passed_over(tmp_path: Path, how: str) -> None:
    plan = eight_steps(tmp_path)
    run = stopped(plan, tmp_path)
    expected = final_hash(plan)
    older, newest = RunCheckpoints(run).names
    folder = run.local_path(f"checkpoints/{newest}")
    assert folder is not None
    if how == "garbled manifest":
        (folder / "manifest.json").write_text("no JSON")
    else:
        is_gone = how == "no manifest"
        damage(
            folder,
            "manifest.json" if is_gone else "train_state.safetensors",
            "remove" if is_gone else how,
        )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(run)
    assert [(line["step"], line["checkpoint"]) for line in ledger.events("start")] == [
        (0, None),
        (4, older),
    ]
    (event,) = ledger.events("checkpoint_damaged")
    assert event["checkpoint"].endswith(newest)
    assert {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != QUARANTINED
    } == before
    assert (folder / QUARANTINED).read_text() == "\n".join(event["problems"])
    assert final_hash(plan) == expected
    assert step_of(RunCheckpoints(run).names[-1]) == 8


FILES = ("model.safetensors", "train_state.safetensors", "config.json")


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_the_disk_alters_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A bit of the checkpoints of steps 4 and 8, each at first."""
    whole, plan = eight_steps(tmp_path / "whole"), eight_steps(tmp_path / "altered")
    train(whole, rank=0, world_size=1)
    altered: list[int] = []

    def altering(folder: Path, metadata: Metadata) -> tuple[Any, list[str]]:
        if metadata.step % 4 == 0 and metadata.step not in altered:
            altered.append(metadata.step)
            damage(folder, file, "flip")
        return read_back(folder, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "read_back", altering)
        patch.setattr(CheckpointWriter, "save", save_and_wait)
        train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    assert [line["step"] for line in ledger.events("checkpoint_refused")] == [4, 8]
    for line in ledger.events("checkpoint_refused"):
        assert "the copy of the state was altered in " in line["reason"]
        assert file in line["reason"]
    assert [line["step"] for line in ledger.events("checkpoint")] == [5, 8]
    assert [line["step"] for line in ledger.events("finish")] == [8]
    assert final_hash(plan) == final_hash(whole)


@pytest.mark.parametrize("part", ["values", "exp_avg", "exp_avg_sq"])
def test_a_bit_that_flips_in_the_copy_is_named_and_the_copy_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """In the host's memory, after the copy was taken and before it is written: at the last step,
    whose weights would be the run's."""
    whole, plan = eight_steps(tmp_path / "whole"), eight_steps(tmp_path / "flipped")
    train(whole, rank=0, world_size=1)
    start = HostCopies.start
    flipped: list[int] = []

    def flipping(copies: HostCopies, phase: Phase, tensors: Sequence[Tensor], take: Take) -> Any:
        copy = start(copies, phase, tensors, take)
        if phase == "checkpoint" and len(flipped) < 2:
            flipped.append(1)
            [flat] = take.args  # type: ignore[attr-defined]
            place = ["values", "exp_avg", "exp_avg_sq"].index(part) * len(tensors[0]) + 40
            flat.view(torch.int32)[place] ^= 1 << 20
        return copy

    with monkeypatch.context() as patch:
        patch.setattr(HostCopies, "start", flipping)
        patch.setattr(CheckpointWriter, "save", save_and_wait)
        train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    reasons = [line["reason"] for line in ledger.events("checkpoint_refused")]
    assert len(reasons) == 2
    assert all("in the memory of" in reason for reason in reasons)
    assert [line["step"] for line in ledger.events("checkpoint")][-1] == 8
    assert final_hash(plan) == final_hash(whole)
    states = [
        Ledger.read(each.run).events("checkpoint")[-1]["state_hash"] for each in (whole, plan)
    ]
    assert states[0] == states[1]


def test_a_run_whose_last_checkpoint_is_refused_has_not_finished_and_a_resume_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk alters a bit of each checkpoint of step 8 in the spool."""
    whole, plan = eight_steps(tmp_path / "whole"), eight_steps(tmp_path / "refused")
    train(whole, rank=0, world_size=1)

    def altering(folder: Path, metadata: Metadata) -> tuple[Any, list[str]]:
        if metadata.step == 8:
            damage(folder, "model.safetensors", "flip")
        return read_back(folder, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "read_back", altering)
        train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    assert not ledger.events("finish")
    assert len(ledger.events("checkpoint_refused")) == 2
    said = str(unfinished(plan, ledger))
    assert "gave up: the checkpoint of step 8 was not stored: the copy of the state was alt" in said
    assert "The same --run-id repeats" in said
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    assert [line["step"] for line in ledger.events("start")] == [0, 4]
    assert [line["step"] for line in ledger.events("finish")] == [8]
    assert final_hash(plan) == final_hash(whole)


@pytest.mark.parametrize("is_always", [False, True])
def test_a_state_that_arrives_otherwise_than_it_was_stored_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_always: bool
) -> None:
    plan = eight_steps(tmp_path)
    run, expected = stopped(plan, tmp_path), final_hash(plan)
    newest = RunCheckpoints(run).names[-1]
    RunCheckpoints(run).delete([newest])
    load, altered = StoredTensors.load, []

    def altering(stored: StoredTensors, wanted: Iterable[tuple[str, range, Tensor]]) -> None:
        into = [*wanted]
        load(stored, into)
        name, _, target = into[-1]
        if name != COUNT and (is_always or not altered):
            altered.append(name)
            target.view(torch.int32)[3] ^= 1 << 20

    with monkeypatch.context() as patch:
        patch.setattr(StoredTensors, "load", altering)
        if is_always:
            with pytest.raises(DamagedStateError, match="rank 0 loaded from checkpoint step-0"):
                train(plan, rank=0, world_size=1)
            return
        train(plan, rank=0, world_size=1)
    assert altered
    assert final_hash(plan) == expected


def test_checkpoints_that_a_killed_writer_did_not_record_are_recorded_by_the_next(
    tmp_path: Path,
) -> None:
    """Older ones too, which no attempt continues from: else nothing would bind them."""
    plan = eight_steps(tmp_path, save_every_steps=2)
    run = stopped(plan, tmp_path)
    before = {line["step"]: line for line in Ledger.read(run).events("checkpoint")}
    lines = run.read_bytes("ledger.jsonl").splitlines(True)
    kept = [line for line in lines if b'"event": "checkpoint"' not in line or b'"step": 2,' in line]
    run.write_bytes("ledger.jsonl", b"".join(kept))
    train(plan, rank=0, world_size=1)
    after = {line["step"]: line for line in Ledger.read(run).events("checkpoint")}
    assert len(before) > 2
    assert after.keys() == before.keys()
    for step, line in after.items():
        for name in ("checkpoint", "parameter_hash", "state_hash", "manifest_hash"):
            assert line[name] == before[step][name], (step, name)


@pytest.mark.chaos
def test_with_all_of_them_corrupt_the_run_stops_and_deletes_nothing(tmp_path: Path) -> None:
    plan = eight_steps(tmp_path)
    run = stopped(plan, tmp_path)
    names = RunCheckpoints(run).names
    for name in names:
        folder = run.local_path(f"checkpoints/{name}")
        assert folder is not None
        damage(folder, "model.safetensors", "flip")
    before = run.list("checkpoints/")
    for _ in range(2):  # nor does the second try start anew
        train(plan, rank=0, world_size=1)
        ledger = Ledger.read(run)
        assert len(ledger.events("start")) == 1
        reason = ledger.events("gave_up")[-1]["reason"]
        assert "are damaged: step-" in reason
        assert all(name in reason for name in names)
    after = {entry.key: entry for entry in run.list("checkpoints/")}
    assert [after[entry.key] for entry in before] == before


def test_a_checkpoint_of_another_shape_is_refused_readably(tmp_path: Path) -> None:
    plan = eight_steps(tmp_path)
    stopped(plan, tmp_path)
    model = replace(plan.config.model, n_layer=plan.config.model.n_layer + 1)
    train(
        replace(plan, config=plan.config.model_copy(update={"model": model})), rank=0, world_size=1
    )
    reason = Ledger.read(plan.run).events("gave_up")[-1]["reason"]
    assert re.search(
        r"step-000000008-0001 of run tiny has n_layer 2, expected 3\. Set these as they were",
        reason,
    )
    train(replace(plan, tokenizer_json=plan.tokenizer_json + b" "), rank=0, world_size=1)
    assert "has another tokenizer" in Ledger.read(plan.run).events("gave_up")[-1]["reason"]
    assert len(Ledger.read(plan.run).events("start")) == 1
