"""Evaluation equals the trainer's own validation, whoever computes it, and says what it cannot
find."""

import math
from pathlib import Path

import pytest
import torch

from cluster.settings.parser import ConfigError
from cluster.settings.stages import EvaluateConfig
from cluster.storage.registry import publish
from cluster.storage.uris import open_storage
from jobs.evaluate import evaluate, perplexity, storage_of
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.tokens.token_store import TokenStoreError
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import read_metadata
from model.files.stored_tokenizer import load_tokenizer
from raymill.errors import CheckpointError
from tests.jobs.runs import make_text, newest_checkpoint, trained_run


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return trained_run(str(tmp_path_factory.mktemp("storage")))


def test_it_computes_in_the_precision_of_the_run(ray_workers: int, tmp_path: Path) -> None:
    plan = trained_run(str(tmp_path), precision="bf16")
    expected = Ledger.read(plan.run).events("validation")[-1]["val_loss"]
    checkpoint = str(newest_checkpoint(plan))
    assert evaluate(EvaluateConfig(checkpoint=checkpoint, batch_size=2))["loss"] == pytest.approx(
        expected, abs=1e-6
    )
    in_fp32 = evaluate(EvaluateConfig(checkpoint=checkpoint, batch_size=2, precision="fp32"))[
        "loss"
    ]
    assert 1e-6 < abs(in_fp32 - expected) < 0.05


def test_it_masks_documents_as_the_run_did(ray_workers: int, tmp_path: Path) -> None:
    plan = trained_run(str(tmp_path), document_mask=True)
    expected = Ledger.read(plan.run).events("validation")[-1]["val_loss"]
    checkpoint = str(newest_checkpoint(plan))
    assert evaluate(EvaluateConfig(checkpoint=checkpoint, batch_size=3))["loss"] == pytest.approx(
        expected, abs=1e-6
    )
    (plan.run.local_path("config.yaml") or tmp_path).unlink()  # without it nobody knows of the mask
    unmasked = evaluate(EvaluateConfig(checkpoint=checkpoint, batch_size=3, seq_len=32))["loss"]
    assert abs(unmasked - expected) > 1e-5


def test_it_equals_the_trainers_validation_for_any_workers(plan: RunPlan, ray_workers: int) -> None:
    checkpoint = newest_checkpoint(plan)
    first, *others = [
        evaluate(EvaluateConfig(checkpoint=str(checkpoint), batch_size=3, num_workers=num_workers))
        for num_workers in (1, ray_workers, ray_workers + 2)
    ]
    validation = Ledger.read(plan.run).events("validation")[-1]
    assert first["loss"] == pytest.approx(validation["val_loss"], abs=1e-6)
    assert first["bits_per_byte"] == pytest.approx(validation["val_bits_per_byte"], abs=1e-6)
    assert first["perplexity"] == pytest.approx(math.exp(validation["val_loss"]), rel=1e-6)
    assert first["parameter_hash"] == read_metadata(checkpoint).parameter_hash
    assert first["tokens"] % 32 == 0
    assert first["tokens"] > 10 * 32
    for other in others:
        assert other | {"tokens_per_s": 0} == first | {"tokens_per_s": 0}


def test_a_run_that_trained_on_gpus_is_evaluated_on_cpus_where_there_is_none(
    plan: RunPlan, ray_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(checkpoint=str(newest_checkpoint(plan)))
    expected = evaluate(config)
    assert "GPU" not in capsys.readouterr().err
    before = plan.run.read_bytes(CONFIG_FILE)
    plan.run.write_bytes(CONFIG_FILE, before.replace(b"use_gpu: false", b"use_gpu: true"))
    try:
        found = evaluate(config)
    finally:
        plan.run.write_bytes(CONFIG_FILE, before)
    assert "this cluster has none" in capsys.readouterr().err
    assert found | {"tokens_per_s": 0} == expected | {"tokens_per_s": 0}


def test_documents_of_ones_own(plan: RunPlan, ray_workers: int, tmp_path: Path) -> None:
    checkpoint, text = newest_checkpoint(plan), make_text(300, seed=2)
    (tmp_path / "own.txt").write_text(text)
    result = evaluate(
        EvaluateConfig.model_validate(
            {
                "checkpoint": str(checkpoint),
                "data": {"source": str(tmp_path / "own.txt")},
                "seq_len": 16,
                "batch_size": 5,
            }
        )
    )
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    assert tokenizer is not None
    ids = torch.tensor([*tokenizer.encode(text), tokenizer.eot_id])
    num_rows = (len(ids) - 1) // 16
    rows = torch.stack([ids[row * 16 : row * 16 + 17] for row in range(num_rows)])  # (R, T + 1)
    with torch.no_grad():
        logits = model.logits(model(rows[:, :-1]))  # (R, T, V)
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), rows[:, 1:].flatten()
    )
    assert result["tokens"] == num_rows * 16
    assert result["loss"] == pytest.approx(float(expected), abs=1e-6)
    assert result["bytes"] == pytest.approx(len(text), rel=0.02)
    assert result["bits_per_byte"] == pytest.approx(
        float(expected) / math.log(2) * len(ids) / len(text), abs=1e-6
    )


def test_latest_is_found_and_tokens_are_bounded(plan: RunPlan, ray_workers: int) -> None:
    publish(open_storage(plan.config.storage.uri), str(newest_checkpoint(plan)))
    config = EvaluateConfig(storage=plan.config.storage, max_tokens=100)
    found = evaluate(config)
    assert (found["tokens"], found["checkpoint"]) == (96, str(newest_checkpoint(plan))), (
        "the one that was measured"
    )


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.0, 1.0), (710.0, None), (math.inf, None), (math.nan, None)]
)
def test_a_perplexity_that_no_float_holds_is_none(loss: float, expected: float | None) -> None:
    assert perplexity(loss) == expected


def test_the_checkpoints_place_names_the_storage() -> None:
    def place(checkpoint: str) -> str:
        return storage_of(
            EvaluateConfig.model_validate({"checkpoint": checkpoint, "storage": {"uri": "/other"}})
        ).uri

    assert place("/mill/runs/r1/checkpoints/step-000000008") == "/mill"
    assert place("s3://bucket/a/runs/r1/checkpoints/step-000000008") == "s3://bucket/a"
    assert place("/mill/runs/r1/checkpoints/step-000000008-0002") == "/mill"
    assert place("/models/runs/gpt2-ft") == place("/models/runs/gpt2-ft/checkpoint-500") == "/other"
    assert place("/mill/exported") == "/other"


def test_what_is_missing_or_does_not_fit_is_named(
    plan: RunPlan, ray_workers: int, tmp_path: Path
) -> None:
    checkpoint = str(newest_checkpoint(plan))
    with pytest.raises(ConfigError, match="seq_len=49 exceeds the model's n_positions=48"):
        evaluate(EvaluateConfig(checkpoint=checkpoint, seq_len=49))
    with pytest.raises(CheckpointError, match="unknown checkpoint"):
        evaluate(EvaluateConfig(checkpoint=str(tmp_path / "none")))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(
        TokenStoreError, match=r"has \d tokens, a row needs 33; add text or lower seq_len"
    ):
        evaluate(
            EvaluateConfig.model_validate(
                {"checkpoint": checkpoint, "data": {"source": str(tmp_path / "short.txt")}}
            )
        )
    moved = newest_checkpoint(plan).rename(tmp_path / "moved")
    try:
        with pytest.raises(
            TokenStoreError,
            match=r"none of the 0 token stores under .* name its storage with --storage\.uri",
        ):
            evaluate(
                EvaluateConfig.model_validate(
                    {"checkpoint": str(moved), "storage": {"uri": str(tmp_path)}}
                )
            )
    finally:
        moved.rename(checkpoint)
