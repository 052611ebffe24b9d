"""An audit finds what was forged: at once where it contradicts the record, and by lot where it does
not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage
from jobs.proof import audit_run
from jobs.proof.audit_run import Audit, audit
from jobs.proof.audits.intervals import Interval, chance_unseen, drawn_by_lot, intervals_of
from jobs.proof.replay_run import Replayed
from jobs.proof.verify_run import verify
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.ledger_chain import encoded, hash_of
from jobs.training.train_loop import train
from jobs.workers.preemption import Notice, Notices
from model.signing.signature import SigningKey
from raymill.errors import UserError
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.poisoned_runs import Faults, run_world
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds
from tests.signing_keys import made_keys
from tests.timestamp_authority import made_authority, running


def forge_loss(run: Storage, step: int) -> None:
    """Makes a step look better, with a chain of lines that fit each other."""
    forged: list[bytes] = []
    head: str | None = None
    for line in Ledger.read(run).lines:
        if "event" not in line and line["step"] == step:
            line["loss"] -= 0.5
        forged.append(encoded(line, head))
        head = hash_of(forged[-1])
    run.write_bytes(LEDGER, b"\n".join(forged) + b"\n")


def change_checkpoint_line(run: Storage, step: int, **fields: str) -> None:
    """With a chain of lines that fit each other."""
    forged: list[bytes] = []
    head: str | None = None
    for line in Ledger.read(run).lines:
        is_meant = line.get("event") == "checkpoint" and line["step"] == step
        forged.append(encoded(line | (fields if is_meant else {}), head))
        head = hash_of(forged[-1])
    run.write_bytes(LEDGER, b"\n".join(forged) + b"\n")


def test_a_true_run_is_valid_and_says_what_may_be_unseen(run: Storage, tmp_path: Path) -> None:
    found = audit(run, Audit(num_samples=2, nonce="mine"), tmp_path / "audit").record
    assert (found.valid, found.problems) == (True, [])
    assert found.intervals_of_run == 3
    assert [at.equal for at in found.intervals] == [True, True]
    assert (found.unseen or {})["1%"] == pytest.approx(1 / 3)
    page = (tmp_path / "audit" / "index.html").read_text()
    assert "2 of 3 intervals gave the same bits again" in page
    assert "33.3%" in page


def test_a_forged_loss_that_fits_its_chain_is_found_where_its_interval_is_drawn(
    run: Storage, tmp_path: Path
) -> None:
    forge_loss(run, 5)
    assert verify(run)["valid"], "nothing that is recorded contradicts it"
    found = audit(run, Audit(num_samples=3), tmp_path / "audit").record
    [problem] = found.problems
    assert problem.startswith("steps 4..6: bits part at step 5")


@pytest.mark.more
def test_a_checkpoint_that_a_stop_has_made_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of a step at which the settings ask for no checkpoint."""
    plan = tiny_plan(str(tmp_path / "storage"))

    def answer(notices: Notices) -> Notice:
        return Notice.STOP if Ledger.read(plan.run).steps[-1]["step"] == 4 else Notice.NONE

    with monkeypatch.context() as patch:
        patch.setattr(Notices, "answer", answer)
        train(plan, rank=0, world_size=1)
    train(plan, rank=0, world_size=1)
    asked = Audit(num_samples=9)
    found = audit(plan.run, asked, tmp_path / "audit").record
    assert found.problems == []
    assert 4 in [at.last for at in found.intervals]
    change_checkpoint_line(plan.run, 4, state_hash="0" * 64)
    found = audit(plan.run, asked, tmp_path / "other").record
    assert any("steps 1..4: bits part at step 4: state_hash" in told for told in found.problems)


@pytest.mark.slow
def test_a_sharded_run_of_which_a_worker_was_killed_is_audited_by_one(tmp_path: Path) -> None:
    plan = tiny_plan(
        str(tmp_path / "storage"),
        train={"sample_prompts": []},
        checkpoint={"save_every_steps": 2},
        scaling={"shard": "parameters"},
    )
    run_in_rounds(plan, tmp_path, [CutOff(1, 6, "killed", saved=4)])
    assert len(Ledger.read(plan.run).events("start")) == 2
    found = audit(plan.run, Audit(num_samples=9), tmp_path / "audit").record
    assert found.problems == []
    assert len(found.intervals) == found.intervals_of_run > 1


@pytest.mark.slow
def test_a_run_that_was_rolled_back_is_audited(tmp_path: Path) -> None:
    plan = mapped_plan(tmp_path / "mapped", train={"max_skipped_steps": 1, "max_tokens": 2000})
    run_world(plan, Faults(poisoned=frozenset({(7, 0), (8, 0)})))
    assert Ledger.read(plan.run).rollbacks
    found = audit(plan.run, Audit(num_samples=9), tmp_path / "audit").record
    assert found.problems == []
    assert len(found.intervals) == found.intervals_of_run > 1


def test_a_forged_interval_is_found_at_the_foretold_rate() -> None:
    intervals = [Interval(10 * number + 1, 10 * number + 10) for number in range(40)]
    forged = {*intervals[7:11]}
    num_audits, num_samples = 200, 10
    seen = 0
    for number in range(num_audits):
        drawn = drawn_by_lot(intervals, num_samples, head="head", nonce=str(number))
        assert len({*drawn}) == num_samples
        seen += bool(forged & {*drawn})
    expected = 1 - chance_unseen(len(intervals), len(forged), num_samples)
    spread = math.sqrt(expected * (1 - expected) / num_audits)
    assert seen / num_audits == pytest.approx(expected, abs=4 * spread)


def test_lots_depend_on_head_and_nonce_and_more_samples_begin_with_fewer() -> None:
    intervals = [Interval(number, number) for number in range(1, 30)]

    def drawn(num_samples: int, head: str, nonce: str) -> list[Interval]:
        return drawn_by_lot(intervals, num_samples, head=head, nonce=nonce)

    assert drawn(9, "a", "b")[:4] == drawn(4, "a", "b")
    assert drawn(9, "a", "b") != drawn(9, "c", "b") != drawn(9, "c", "d")
    assert {*drawn(99, "a", "b")} == {*intervals}
    assert chance_unseen(20, 2, 99) == 0


def test_intervals_lie_between_what_is_kept_without_what_a_rollback_left_out() -> None:
    lines = [{"step": step} for step in (1, 2, 3, 4, 5, 6)]
    lines += [{"event": "rollback", "first": 5, "last": 6}, {"step": 7}, {"step": 8}]
    ledger = Ledger(lines)
    assert intervals_of(ledger, [4, 8]) == [Interval(1, 4), Interval(7, 8)]
    assert intervals_of(ledger, [8]) == [Interval(1, 8)]
    assert intervals_of(ledger, [0, 4]) == [Interval(1, 4)]
    assert intervals_of(ledger, [4, 6, 8]) == [Interval(1, 4), Interval(7, 8)]


def test_an_interrupted_audit_goes_on(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[range] = []
    replay = audit_run.replay

    def replay_once(run: Storage, *, steps: range, **rest: Any) -> Replayed:
        if len(taken) == 1:
            taken.append(steps)
            raise KeyboardInterrupt
        taken.append(steps)
        return replay(run, steps=steps, **rest)

    monkeypatch.setattr(audit_run, "replay", replay_once)
    with pytest.raises(KeyboardInterrupt):
        audit(run, Audit(num_samples=3), tmp_path / "audit")
    begun = json.loads((tmp_path / "audit/audit.json").read_bytes())
    found = audit(run, Audit(num_samples=3), tmp_path / "audit").record
    assert found.valid
    assert found.nonce == begun["nonce"]
    assert len(taken) == 4, "the interval that was done is not taken again"
    with pytest.raises(UserError, match=r"whose nonce is .*, not another: name another folder"):
        audit(run, Audit(num_samples=3, nonce="another"), tmp_path / "audit")


def test_what_cannot_be_audited_is_refused(run: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples 0: expected at least 1"):
        audit(run, Audit(num_samples=0), tmp_path / "audit")
    for entry in run.list("checkpoints/"):
        run.delete(entry.key)
    with pytest.raises(UserError, match="no checkpoint to which steps could be taken again"):
        audit(run, Audit(num_samples=1), tmp_path / "audit")


def test_the_command_writes_a_signed_report(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = made_keys(tmp_path, "auditor")
    folder = tmp_path / "audit"
    told = ["--samples", "1", "--to", str(folder), "--sign", str(private)]
    with running(made_authority(tmp_path / "stamps")) as authority:
        told += ["--timestamp", authority.url]
        assert main(["audit", run.uri, *told]) == 0
    assert authority.answers
    said = capsys.readouterr()
    assert "will be taken again, about" in said.err
    assert "1 of 3 intervals gave the same bits again" in said.out
    from model_signing.verifying import Config

    verifying = Config().use_elliptic_key_verifier(public_key=public)
    verifying.verify(folder, folder / "model.sig")
    (folder / "audit.json").write_text("{}")
    with pytest.raises(ValueError, match="Hash mismatch"):
        verifying.verify(folder, folder / "model.sig")
    assert SigningKey.at(private).passphrase is None
