"""A run that forgets ends with the bits of the run that was trained from the beginning without those
documents, and of one that never saw them; what cannot be forgotten is refused in a sentence."""

import json
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.settings.parser import ConfigError
from cluster.storage.registry import publish
from cluster.storage.uris import Storage, open_storage
from jobs.forgetting.certify import certify
from jobs.forgetting.forget_plan import ForgetRequest, Forgetting, forgetting
from jobs.forgetting.former_run import purge, remnants
from jobs.proof.audit_run import Audit, audit
from jobs.proof.verify_run import verify
from jobs.proof.where_run import where
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.history import changed_settings
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.tokens.document_map import DOCUMENTS, NoDocumentMapError
from raymill.errors import UserError
from tests.jobs.forgotten_runs import (
    Forgotten,
    laid_out,
    never_seen,
    some_documents,
)
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import final_hash, make_text

BOOK = "books/1.txt"


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """Two sources of different weights, several epochs, a batch that grows; documents see nothing of
    each other."""
    train = {"max_tokens": 2500, "document_mask": True}
    train |= {"global_batch_size": 8, "batch_ramp_start": 4}
    plan = mapped_plan(tmp_path_factory.mktemp("former"), train=train)
    run_world(plan)
    return plan


@pytest.fixture(scope="module")
def forgotten(former: RunPlan) -> Forgotten:
    """The run has forgotten a book, on another number of workers of which one was killed."""
    found = laid_out(former, BOOK)
    found.trained(world_size=2, dies_at=found.asked.asked.first_step + 3)
    certify(found.asked.new, None)
    return found


def lists_of(run: Storage) -> list[dict[str, object]]:
    compared = ("step", "loss", "grad_norm", "lr", "samples", "tokens_seen")
    return [{name: line[name] for name in compared} for line in Ledger.read(run).steps]


def test_a_run_that_forgets__has_the_bits_of_one_that_never_saw_the_document(
    former: RunPlan, forgotten: Forgotten, tmp_path: Path
) -> None:
    """Each step has the same loss, norm, rate and samples; in the copy that a run is trained on from
    its first step, no byte of the document is there."""
    assert forgotten.start is not None
    assert step_of(forgotten.start) < forgotten.asked.asked.first_step
    plan = never_seen(forgotten.plan, forgotten.asked.holes, tmp_path / "never")
    run_world(plan)
    assert final_hash(plan) == final_hash(forgotten.plan) != final_hash(former)
    assert lists_of(plan.run) == lists_of(forgotten.plan.run)


def test_a_run_that_forgets__is_verified_and_audited_from_its_first_step(
    forgotten: Forgotten, tmp_path: Path
) -> None:
    run = forgotten.asked.new
    assert verify(run)["problems"] == []
    report = audit(run, Audit(100, "nonce"), tmp_path / "audit")
    assert report.record.problems == []
    first = min(interval.first for interval in report.record.intervals)
    last = max(interval.last for interval in report.record.intervals)
    assert (first, last) == (1, forgotten.asked.plan.of_steps)


def test_the_ledger_of_a_run_that_forgets__tells_where_it_comes_from(
    former: RunPlan, forgotten: Forgotten
) -> None:
    ledger, before = Ledger.read(forgotten.asked.new), Ledger.read(former.run)
    [told] = ledger.events("forgotten")
    assert told["checkpoint"] == forgotten.start
    assert (
        told["documents"] == forgotten.asked.holes.hash == ledger.events("start")[-1]["forgotten"]
    )
    of_former = {line["step"]: line for line in before.steps}
    copied = ledger.lines[: ledger.lines.index(told)]
    steps = [line["step"] for line in copied if "event" not in line]
    assert steps == [*range(1, told["step"] + 1)]
    assert all(line == of_former[line["step"]] for line in copied if "event" not in line)
    assert [pause for pause in ledger.pauses] == [2]  # noqa: C416 (the attempt that goes on)


def test_where__finds_a_forgotten_document_at_no_step(
    former: RunPlan, forgotten: Forgotten
) -> None:
    [before] = where(former.run, document=BOOK).documents  # type: ignore[union-attr]
    [after] = where(forgotten.asked.new, document=BOOK).documents  # type: ignore[union-attr]
    assert before.turns
    assert not after.turns
    assert after.verdict == "forgotten: the run is trained without it"
    assert before.first_step is not None
    assert forgotten.asked.plan.first_step <= before.first_step
    step = where(forgotten.asked.new, step=before.first_step)
    taught = [document for row in step.rows for document in row.documents]  # type: ignore[union-attr]
    book = [document.tokens for document in taught if (document.file or "").endswith(BOOK)]
    assert book
    assert not any(book)


def test_a_run__is_not_resumed_with_other_documents_left_out(forgotten: Forgotten) -> None:
    config = forgotten.plan.config
    assert changed_settings(forgotten.asked.new, config) == []
    data = config.data.model_copy(update={"forgotten": None})
    [changed] = changed_settings(forgotten.asked.new, config.model_copy(update={"data": data}))
    assert changed.startswith("data.forgotten was ")


@pytest.mark.more
def test_a_second_request__is_joined_with_the_first(former: RunPlan, forgotten: Forgotten) -> None:
    """The run that has forgotten one document forgets others too: as both at once."""
    others = some_documents(former, seed=1, num_documents=3)
    together = laid_out(former, BOOK, *others)
    after = laid_out(forgotten.plan, *others)
    assert after.asked.holes == together.asked.holes
    assert after.asked.plan.new_run == together.asked.plan.new_run
    shutil.rmtree(str(together.asked.new.local_path("")))
    after = laid_out(forgotten.plan, *others)
    after.trained()
    certify(after.asked.new, None)
    assert verify(after.asked.new)["problems"] == []
    assert final_hash(after.plan) == final_hash(after.from_the_beginning())


def test_a_request_by_list_and_pattern__names_the_same_documents(
    former: RunPlan, tmp_path: Path
) -> None:
    references = some_documents(former, seed=2, num_documents=2)
    listed = tmp_path / "list"
    listed.write_text("\n".join(references) + "\n\n")
    by_list = forgetting(former.run, ForgetRequest(listed=listed), price=None)
    by_name = forgetting(former.run, ForgetRequest(references), price=None)
    assert by_list.holes == by_name.holes
    texts = [where(former.run, document=each).documents[0].text for each in references]  # type: ignore[union-attr]
    pattern = "|".join(rf"^{text[:12]}" for text in texts)
    assert forgetting(former.run, ForgetRequest(pattern=pattern), price=None).holes == by_name.holes


def test_the_price__is_that_of_the_steps_to_take_again(former: RunPlan) -> None:
    found = forgetting(former.run, ForgetRequest([BOOK]), price=3.0)
    start = step_of(str(found.plan.checkpoint))
    took = [line["wall_s"] for line in Ledger.read(former.run).steps if line["step"] > start]
    assert found.plan.steps_again == len(took)
    assert found.plan.price.hours == pytest.approx(sum(took) / 3600)
    assert found.plan.price.dollars == pytest.approx(sum(took) / 3600 * 3.0)
    assert all(step_of(name) < found.plan.first_step for name in found.plan.stays)


@pytest.mark.more
def test_short_documents_of_one_epoch__cost_what_the_formula_says(tmp_path: Path) -> None:
    """k documents anywhere in a run leave 1/(k+1) of it before the first, on average."""
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{n} {make_text(5, seed=n)}"}) for n in range(400)]
    texts.write_text("\n".join(lines) + "\n")
    train = {"max_tokens": 4500, "global_batch_size": 2}
    train |= {"batch_ramp_start": None, "batch_ramp_tokens": 0}
    plan = mapped_plan(tmp_path, train=train, data={"source": [str(texts)]})
    run_world(plan)
    for count in (1, 4):
        shares = []
        for seed in range(40):
            documents = some_documents(plan, seed=100 * count + seed, num_documents=count)
            found = forgetting(plan.run, ForgetRequest(documents), price=None).plan
            shares.append(found.steps_again / found.of_steps)
        error = statistics.stdev(shares) / len(shares) ** 0.5
        assert abs(statistics.mean(shares) - count / (count + 1)) < 4 * error


def held_out_of(former: RunPlan) -> str:
    """Returns a reference to a document that is held out."""
    file = Path(former.config.storage.uri).parent / "texts/web/a.jsonl"
    place = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            [found] = where(former.run, document=f"{file}:{place}").documents  # type: ignore[union-attr]
            if found.verdict.startswith("held out"):
                return f"{file}:{place}"
        except UserError:
            assert b"broken" in line or place
        place += len(line)
    raise AssertionError("none is held out")


def test_what_cannot_be_forgotten__is_refused(
    former: RunPlan, forgotten: Forgotten, tmp_path: Path
) -> None:
    def refusal(run: Storage, request: ForgetRequest) -> str:
        with pytest.raises(UserError) as error:
            forgetting(run, request, price=None)
        return str(error.value)

    run = former.run
    assert "is no file that" in refusal(run, ForgetRequest(["letters/none.txt"]))
    assert "no document begins at byte 1 of" in refusal(run, ForgetRequest([f"{BOOK}:1"]))
    assert "is held out to validate the run" in refusal(run, ForgetRequest([held_out_of(former)]))
    assert "is forgotten already" in refusal(forgotten.asked.new, ForgetRequest([BOOK]))
    assert "matched, and no step read one" in refusal(run, ForgetRequest(pattern="никто"))
    assert "is no regular expression" in refusal(run, ForgetRequest(pattern="("))
    assert "cannot be read" in refusal(run, ForgetRequest(listed=tmp_path / "none"))
    assert "names nothing" in refusal(run, ForgetRequest(listed=_empty(tmp_path)))
    copy = tmp_path / "storage"
    shutil.copytree(former.config.storage.uri, copy)
    [documents] = copy.glob(f"tokens/*/{DOCUMENTS}")
    documents.unlink()
    with pytest.raises(NoDocumentMapError, match="raymill tokenize --documents"):
        forgetting(open_storage(str(copy)).child("runs/tiny"), ForgetRequest([BOOK]), price=None)


def _empty(folder: Path) -> Path:
    file = folder / "empty"
    file.write_text("\n \n")
    return file


@pytest.mark.more
def test_a_document_that_is_still_to_come__is_refused(former: RunPlan, tmp_path: Path) -> None:
    storage = former.config.storage.model_copy(update={"uri": str(tmp_path / "storage")})
    shutil.copytree(
        former.config.storage.uri, storage.uri, ignore=shutil.ignore_patterns("checkpoints")
    )
    run = open_storage(storage.uri).child("runs/tiny")
    first = forgetting(former.run, ForgetRequest([BOOK]), price=None).plan.first_step
    lines = run.read_bytes("ledger.jsonl").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("step", 0) < first]
    run.write_bytes("ledger.jsonl", b"".join(kept))
    with pytest.raises(UserError, match=f"step {first} is to come, the run is at step {first - 1}"):
        forgetting(run, ForgetRequest([BOOK]), price=None)


def test_a_run_without_equal_bits_or_of_two_stores__is_refused(
    former: RunPlan, tmp_path: Path
) -> None:
    copy = tmp_path / "storage"
    shutil.copytree(former.config.storage.uri, copy, ignore=shutil.ignore_patterns("checkpoints"))
    run = open_storage(str(copy)).child("runs/tiny")
    ledger = run.read_bytes("ledger.jsonl")
    start = {**Ledger.read(run).events("start")[0], "data_identity": "another"}
    run.write_bytes("ledger.jsonl", json.dumps(start).encode() + b"\n" + ledger)
    with pytest.raises(UserError, match="trained on 2 token stores"):
        forgetting(run, ForgetRequest([BOOK]), price=None)
    run.write_bytes("ledger.jsonl", ledger)
    settings = run.read_bytes("config.yaml").replace(b"exact: true", b"exact: false")
    run.write_bytes("config.yaml", settings)
    with pytest.raises(UserError, match=r"train\.exact=false"):
        forgetting(run, ForgetRequest([BOOK]), price=None)


def copied(forgotten: Forgotten, folder: Path) -> Forgetting:
    """Returns the request, about a copy of the storage."""
    shutil.copytree(forgotten.former.config.storage.uri, folder)
    storage = open_storage(str(folder))
    opened = replace(forgotten.asked.opened, run=storage.child("runs/tiny"))
    return replace(forgotten.asked, opened=opened, storage=storage)


def test_purge__removes_what_read_the_document_and_nothing_needs(
    forgotten: Forgotten, tmp_path: Path
) -> None:
    asked = copied(forgotten, tmp_path / "storage")
    checkpoints = RunCheckpoints(asked.former)
    tainted = [name for name in checkpoints.names if step_of(name) >= asked.plan.first_step]
    stays = [name for name in checkpoints.names if name not in tainted]
    exported = tmp_path / "storage/exported"
    shutil.copytree(checkpoints.fetch(tainted[0], tmp_path), exported)
    publish(asked.storage, checkpoints.uri(tainted[-1]))
    listed = {remnant.uri: remnant for remnant in remnants(asked)}
    assert set(map(checkpoints.uri, tainted)) | {str(exported)} <= listed.keys()
    assert not set(map(checkpoints.uri, stays)) & listed.keys()
    assert listed[checkpoints.uri(tainted[-1])].needed_by == [
        f"{checkpoints.uri(tainted[-1])} is latest"
    ]
    done = {remnant.uri for remnant in purge(asked) if remnant.is_removed}
    assert done == {*map(checkpoints.uri, tainted[:-1]), str(exported)}
    assert checkpoints.names == [*stays, tainted[-1]]
    assert not any(exported.glob("*"))
    assert verify(asked.new)["problems"] == []


@pytest.mark.more
@pytest.mark.parametrize("seed", range(3))
def test_random_documents__are_forgotten_as_if_never_seen(
    former: RunPlan, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    documents = some_documents(former, seed, num_documents=rng.choice([1, 2, 5]))
    found = laid_out(former, *documents)
    found.trained(world_size=rng.randint(1, 2))
    plan = never_seen(found.plan, found.asked.holes, tmp_path / "never", seed=seed)
    run_world(plan)
    assert final_hash(plan) == final_hash(found.plan)


def test_nothing_named__is_refused_at_the_command_line(former: RunPlan) -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        ForgetRequest(listed=Path("/dev/null")).references()
