"""What an endpoint's process answers for a checkpoint of a real run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LEDGER
from jobs.run.run_plan import RunPlan
from jobs.tokens.document_map import DOCUMENTS
from jobs.trace.checkpoint_trace import Checkpoint, CheckpointTrace, Limits, LineageError, Question
from jobs.trace.trace_run import trace
from jobs.trace.windows import LEAST_SPAN
from model.files.checkpoint_folder import read_metadata
from raymill.errors import UserError
from tests.jobs.planted_runs import PASSAGE, ROLLED_BACK

LIMITS = Limits(max_tokens=1000, max_listed=500, max_steps=64)
TEXT = f"unheard of: {PASSAGE} and so on"
QUESTION = Question(TEXT, None, min_tokens=LEAST_SPAN, documents=5, context_tokens=48)


def checkpoints_of(storage: Path) -> dict[int, Checkpoint]:
    run = open_storage(str(storage / "runs" / "tiny"))
    known: dict[int, Checkpoint] = {}
    for name in RunCheckpoints(run).names:
        folder = Path(run.uri, "checkpoints", name)
        about = read_metadata(folder)
        known[about.step] = Checkpoint(
            str(folder), about.run_id, about.step, about.data_manifest_hash, about.data_identity
        )
    return known


def opened(storage: Path, checkpoint: Checkpoint, limits: Limits = LIMITS) -> CheckpointTrace:
    [store] = [path.parent for path in storage.glob("tokens/*/manifest.json")]
    return CheckpointTrace(checkpoint, limits, store_uri=str(store), storage_uri=str(storage))


@pytest.fixture
def storage(plan: RunPlan) -> Path:
    return Path(plan.config.storage.uri)


@pytest.fixture
def copied(storage: Path, tmp_path: Path) -> Path:
    """A copy of the storage, to be spoiled."""
    return Path(shutil.copytree(storage, tmp_path / "copy"))


@pytest.mark.more
def test_a_checkpoint_knows_no_later_step(plan: RunPlan, storage: Path) -> None:
    checkpoints = checkpoints_of(storage)
    whole = trace(plan.run, TEXT, min_tokens=LEAST_SPAN).json()["spans"][0]
    assert min(checkpoints) < whole["last_step"]
    for step, checkpoint in checkpoints.items():
        answer = opened(storage, checkpoint).answer(QUESTION)
        if ROLLED_BACK[0] <= step <= ROLLED_BACK[1]:
            [unnamed] = answer["missing"]
            assert f"went back behind step {step} later" in unnamed
            continue
        [span] = answer["spans"]
        [known] = trace(plan.run, TEXT, min_tokens=LEAST_SPAN, step=step).json()["spans"]
        assert (span["first_step"], span["last_step"]) == (known["first_step"], known["last_step"])
        numbers = [place["num_steps"] for place in span["documents"]]
        assert sum(numbers) >= known["steps"]
        assert span["last_step"] is None or span["last_step"] <= step


def test_what_is_missing_is_named_and_the_rest_is_said(copied: Path) -> None:
    newest = max(checkpoints_of(copied).items())[1]
    whole = opened(copied, newest).answer(QUESTION)
    assert whole["missing"] == []
    [store] = [path.parent for path in copied.glob("tokens/*/manifest.json")]
    (store / DOCUMENTS).unlink()
    (copied / "runs" / "tiny" / LEDGER).unlink()
    answer = opened(copied, newest).answer(QUESTION)
    no_map, no_ledger = answer["missing"]
    assert "has no document map" in no_map
    assert "the steps are unknown" in no_ledger and str(copied) in no_ledger
    [span], [known] = answer["spans"], whole["spans"]
    assert span["occurrences"] == known["occurrences"]
    for place, expected in zip(span["documents"], known["documents"], strict=True):
        assert (place["file"], place["num_steps"], place["steps"]) == (None, None, [])
        assert (place["before"], place["behind"]) == (expected["before"], expected["behind"])
    (part,) = store.glob("trace/*/part-*.idx")
    part.unlink()
    with pytest.raises(UserError, match=rf"{part.name} is missing"):
        opened(copied, newest).answer(QUESTION)


def test_other_data_and_no_data_are_refused(storage: Path, tmp_path: Path) -> None:
    newest = max(checkpoints_of(storage).items())[1]
    other = replace(newest, data_manifest_hash="d" * 64, data_identity="e" * 64)
    with pytest.raises(LineageError, match=rf"{newest.data_manifest_hash}.* on d{{64}}"):
        opened(storage, other)
    same_shards = replace(newest, data_manifest_hash="d" * 64)
    assert opened(storage, same_shards).answer(QUESTION)["spans"]
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        CheckpointTrace(newest, LIMITS, store_uri=str(tmp_path), storage_uri=str(storage))


def test_an_answer_stays_within_its_limits(storage: Path) -> None:
    newest = max(checkpoints_of(storage).items())[1]
    limits = Limits(max_tokens=1000, max_listed=2, max_steps=3)
    text = f"{TEXT}. {TEXT}. {TEXT}."
    answer = opened(storage, newest, limits).answer(replace(QUESTION, text=text))
    assert answer["num_spans"] == 3
    assert len(answer["spans"]) == 2
    for span in answer["spans"]:
        [place] = span["documents"]
        assert len(place["steps"]) == 3 < place["num_steps"]
    with pytest.raises(UserError, match="at most 20 are traced at once; divide the text"):
        opened(storage, newest, replace(limits, max_tokens=20)).answer(QUESTION)
