"""Certificates of runs that forgot: honest ones are verified, also by model_signing's own command, and
dishonest ones are found by `raymill verify` or by an audit."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import Storage
from jobs.forgetting.certify import certify
from jobs.forgetting.fork_run import _write_ledger, fork
from jobs.proof.audit_run import Audit, audit
from jobs.proof.recorded.certificate import CERTIFICATE, FORGETTING
from jobs.proof.verify_run import verify
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.run_plan import RunPlan
from jobs.tokens.holes import Hole, Holes
from model.signing.signature import SigningKey, TrustedSigner
from raymill.errors import UserError
from tests.jobs.forgotten_runs import Forgotten, laid_out, some_documents
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.poisoned_runs import run_world
from tests.signing_keys import made_keys

BOOK = "books/1.txt"


@dataclass(frozen=True)
class Office:
    """A storage with a run that forgot, and the keys of who certified it."""

    forgotten: Forgotten
    keys: tuple[Path, Path]
    folder: Path

    @property
    def run(self) -> Storage:
        return self.forgotten.asked.new

    @property
    def certificate(self) -> Path:
        path = self.run.local_path(f"{FORGETTING}/{CERTIFICATE}")
        assert path is not None
        return path

    def certify(self) -> None:
        certify(self.run, SigningKey.at(self.keys[0]))

    def claim(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Certifies something else, and signs that."""
        from model.signing.signature import sign_files

        content = json.loads(self.certificate.read_bytes())
        edit(content)
        self.certificate.write_text(json.dumps(content))
        (self.certificate.parent / "model.sig").unlink()
        sign_files(self.certificate.parent, SigningKey.at(self.keys[0]))

    def rewrite(self, edit: Callable[[list[Line]], list[Line]]) -> None:
        """Writes the ledger anew, each line fitting the one before."""
        _write_ledger(self.run, edit(Ledger.read(self.run).lines))

    def problems(self, key: Path | None = None) -> str:
        # The checkpoints themselves are not signed here: what is said of the certificate counts
        found = verify(self.run, signed_by=TrustedSigner(key or self.keys[1]))["problems"]
        return "; ".join(problem for problem in found if not problem.startswith("step-"))


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = mapped_plan(tmp_path_factory.mktemp("former"), train={"max_tokens": 2000})
    run_world(plan)
    return plan


@pytest.fixture(scope="module")
def honest(former: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Office:
    folder = tmp_path_factory.mktemp("keys")
    office = Office(laid_out(former, BOOK), made_keys(folder, "release"), folder)
    office.forgotten.trained()
    office.certify()
    return office


@pytest.fixture
def office(honest: Office, tmp_path: Path) -> Office:
    """A copy, to be spoiled."""
    return in_copy(honest, tmp_path / "storage")


def in_copy(honest: Office, folder: Path) -> Office:
    from cluster.storage.uris import open_storage

    shutil.copytree(honest.forgotten.former.config.storage.uri, folder)
    storage = open_storage(str(folder))
    asked = replace(
        honest.forgotten.asked,
        storage=storage,
        opened=replace(honest.forgotten.asked.opened, run=storage.child("runs/tiny")),
    )
    return replace(honest, forgotten=replace(honest.forgotten, asked=asked))


def trained_anew(office: Office, **changed: Any) -> Office:
    """Trains another run in the storage, of a request that was changed, and certifies it."""
    asked = office.forgotten.asked
    asked = replace(asked, **{"plan": replace(asked.plan, new_run="dishonest"), **changed})
    fork(asked)
    config = recorded_config(asked.new)
    plan = replace(office.forgotten.plan, config=config, holes=asked.holes)
    run_world(plan)
    dishonest = replace(office, forgotten=replace(office.forgotten, asked=asked, plan=plan))
    dishonest.certify()
    return dishonest


def test_an_honest_certificate__is_verified_by_both(honest: Office) -> None:
    assert honest.problems() == ""
    folder = honest.certificate.parent
    verified = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "model_signing"), "verify", "key", str(folder)),
            *("--signature", str(folder / "model.sig"), "--public_key", str(honest.keys[1])),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    told = json.loads(honest.certificate.read_bytes())
    holes = honest.forgotten.asked.holes.holes
    assert [document["sha256"] for document in told["documents"]] == [holes[0].sha256]
    assert told["former_run"] == "tiny"
    ledger = honest.run.read_bytes(LEDGER).splitlines()
    assert told["ledger"]["sha256"] == hashlib.sha256(ledger[-1]).hexdigest()
    assert BOOK not in honest.certificate.read_text()


def test_a_document_that_stayed__is_found(office: Office, former: RunPlan) -> None:
    """The certificate names one that the run learned."""
    other = laid_out(former, *some_documents(former, seed=3, num_documents=1)).asked.holes.holes[0]
    stayed = {"sha256": other.sha256, "tokens": other.tokens}
    office.claim(lambda told: told["documents"].append(stayed))
    assert f"the document {other.sha256[:12]}… stayed" in office.problems()
    office.claim(lambda told: told["documents"].clear())
    assert "does not name 1 of the documents that are left out" in office.problems()


@pytest.mark.more
def test_a_hole_elsewhere__is_found(office: Office, former: RunPlan) -> None:
    """The list has the document's hash, at another one's place."""
    asked = office.forgotten.asked
    [book] = asked.holes.holes
    other = laid_out(former, *some_documents(former, seed=3, num_documents=1)).asked.holes.holes[0]
    holes = Holes(asked.holes.data_identity, (replace(other, sha256=book.sha256),))
    first_step = replace(asked.asked, first_step=1)
    dishonest = trained_anew(office, holes=holes, asked=first_step)
    assert f"the document {book.sha256[:12]}… stayed: it does not lie at" in dishonest.problems()


@pytest.mark.more
def test_a_hole_in_a_part_of_a_document__is_found(office: Office) -> None:
    from jobs.tokens.shard_reader import Piece, read_piece
    from jobs.tokens.token_store import read_manifest

    asked = office.forgotten.asked
    [book] = asked.holes.holes
    (store,) = (
        path.parent for path in (Path(asked.storage.uri) / "tokens").glob("*/manifest.json")
    )
    from cluster.storage.uris import open_storage

    tokens = open_storage(str(store))
    manifest = read_manifest(tokens)
    [shard] = [shard for shard in manifest.shards if shard.file == book.shard]
    part = Piece(shard, book.start + 5, book.end)
    content = read_piece(tokens, part, manifest.dtype)
    hole = Hole(book.shard, part.start, part.end, hashlib.sha256(content).hexdigest())
    dishonest = trained_anew(office, holes=Holes(asked.holes.data_identity, (hole,)))
    assert "leaves out a part of a document" in dishonest.problems()


@pytest.mark.more
def test_a_step_that_was_not_taken_again__is_found(office: Office) -> None:
    """The run goes on from a checkpoint that has read the document."""
    asked = office.forgotten.asked
    later = replace(asked.asked, first_step=asked.plan.first_step + 8)
    dishonest = trained_anew(office, asked=later)
    found = dishonest.problems()
    assert f"step {asked.plan.first_step} reads one of the documents and was not taken" in found
    dishonest.claim(lambda told: told.update(first_step=later.first_step))
    assert f"it says first_step {later.first_step}" in dishonest.problems()


def test_an_attempt_that_read_the_document__is_found(office: Office) -> None:
    def with_all(lines: list[Line]) -> list[Line]:
        last = max(n for n, line in enumerate(lines) if line.get("event") == "start")
        lines[last].pop("forgotten")
        return lines

    office.rewrite(with_all)
    office.certify()
    assert "was not trained without the documents" in office.problems()


def test_lines_that_were_changed_since__are_found(office: Office) -> None:
    def with_loss(lines: list[Line]) -> list[Line]:
        lines[-3]["loss"] = 1.0
        return lines

    office.rewrite(with_loss)
    assert "has another line" in office.problems()


def test_former_weights_that_are_called_new__are_found_by_an_audit(office: Office) -> None:
    """Nothing was taken again: the former run's steps and checkpoints stand behind the line that
    says where they come from."""
    asked = office.forgotten.asked
    ledger, former = Ledger.read(asked.new), Ledger.read(asked.former)
    place = ledger.lines.index(ledger.events("forgotten")[0])
    begun = next(line for line in ledger.lines[place:] if line.get("event") == "start")
    step = ledger.lines[place]["step"]
    checkpoints, copies = RunCheckpoints(asked.former), RunCheckpoints(asked.new)
    for name in copies.names:
        if step_of(name) > step:
            copies.delete([name])
    for name in checkpoints.names:
        if step_of(name) > step:
            shutil.copytree(checkpoints.fetch(name, Path()), copies.fetch(name, Path()))
    steps: list[Line] = []
    for line in former.lines:
        if line.get("step", 0) > step and line.get("event") not in ("start", "phases"):
            steps.append(dict(line))
            if line.get("event") == "checkpoint":
                steps[-1]["checkpoint"] = copies.uri(line["checkpoint"].rpartition("/")[2])
    _write_ledger(asked.new, [*ledger.lines[: place + 1], begun, *steps])
    office.certify()
    assert office.problems() == ""
    report = audit(asked.new, Audit(100, "nonce"), office.folder / "audit")
    assert any("bits part at step" in problem for problem in report.record.problems)


def test_a_certificate_that_was_edited_or_signed_by_another__is_found(
    office: Office, tmp_path: Path
) -> None:
    assert "signed with another key" in office.problems(made_keys(tmp_path, "other")[1])
    content = office.certificate.read_text()
    office.certificate.write_text(content.replace('"tiny"', '"other"'))
    assert "is another than was signed" in office.problems()
    office.claim(lambda told: None)
    assert "it says former_run other, the run's records tiny" in office.problems()
    office.certificate.write_text("{}")
    assert "is no certificate" in "; ".join(verify(office.run)["problems"])
    shutil.rmtree(office.certificate.parent)
    assert "is missing: `raymill forget` makes it" in office.problems()


def test_settings_without_the_list__are_found(office: Office) -> None:
    settings = office.run.read_bytes(CONFIG_FILE)
    name = office.forgotten.asked.holes.hash.encode()
    office.run.write_bytes(CONFIG_FILE, settings.replace(name, b"null"))
    assert "the run forgets nothing" in office.problems()
    office.run.write_bytes(CONFIG_FILE, settings)
    office.forgotten.asked.storage.delete(f"forgotten/{name.decode()}.json")
    assert "put it back from a copy" in office.problems()


def test_a_run_that_is_not_done__is_not_certified(office: Office) -> None:
    office.rewrite(lambda lines: [line for line in lines if line.get("event") != "finish"])
    with pytest.raises(UserError, match="is not finished"):
        office.certify()
