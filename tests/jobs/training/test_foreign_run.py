"""Runs of models of transformers: from a config.json or from saved weights, resumed and replayed with
the same bits, and out again as folders that transformers loads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, to_yaml
from cluster.settings.stages import EvaluateConfig
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.pretrain import _shape_for
from jobs.proof.replay_run import replay
from jobs.report.probe_run import probe_run
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.history import changed_settings, recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from jobs.training.warm_start import begin, like_its_source
from model.files.checkpoint import load_decoder, load_model
from model.files.checkpoint_folder import read_metadata
from model.files.hf_config import UnsupportedModelError
from model.foreign_config import ForeignConfig, ForeignModelError
from model.text.tokenizer import Tokenizer
from raymill.files.safetensors_file import parameter_hash
from serving.protocol.served_model import is_of_one_kind, read_served_model
from tests.foreign_models import small
from tests.jobs.runs import tiny_plan

PADDED_VOCAB = 320  # the tokenizer has 300 ids


def foreign_plan(
    folder: Path, run_id: str, family: str, *, num_steps: int = 8, **train_settings: Any
) -> RunPlan:
    """Returns the plan of a run of a family's small model, made from its config.json."""
    config = small(family, vocab_size=PADDED_VOCAB)
    return tiny_plan(
        str(folder / "storage"),
        num_steps=num_steps,
        train=train_settings,
        run_id=run_id,
        model={"config": config.values},
    )


def hashes(plan: RunPlan) -> list[str]:
    return [line["parameter_hash"] for line in Ledger.read(plan.run).events("checkpoint")]


def last_checkpoint(plan: RunPlan, folder: Path) -> Path:
    checkpoints = RunCheckpoints(plan.run)
    return checkpoints.fetch(checkpoints.names[-1], folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run of experts, trained to its end."""
    plan = foreign_plan(
        tmp_path_factory.mktemp("run"),
        "whole",
        "qwen3_moe",
        document_mask=True,
        layer_statistics_every_steps=4,
    )
    train(plan, rank=0, world_size=1)
    return plan


def test_a_run_of_a_config_file__learns_and_validates(run: RunPlan) -> None:
    ledger = Ledger.read(run.run)
    losses = [line["loss"] for line in ledger.steps]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
    validation = ledger.events("validation")[-1]
    assert validation["val_loss"] < losses[0]
    assert validation["samples"][0]["text"]


def test_a_run_of_a_config_file__that_is_resumed__has_the_bits_of_one_go(
    run: RunPlan, tmp_path: Path
) -> None:
    parts = foreign_plan(
        tmp_path, "parts", "qwen3_moe", document_mask=True, layer_statistics_every_steps=4
    )
    train(replace(parts, until=5), rank=0, world_size=1)
    train(parts, rank=0, world_size=1)
    assert hashes(parts)[-1] == hashes(run)[-1]
    assert recorded_config(parts.run).model == run.config.model
    assert changed_settings(parts.run, parts.config) == []
    other = small("qwen3_moe", vocab_size=PADDED_VOCAB, rms_norm_eps=1e-3)
    changed = parts.config.model_copy(update={"model": other})
    assert changed_settings(parts.run, changed) == ["model.rms_norm_eps was None, now 0.001"]


@pytest.mark.slow
def test_a_run_of_a_config_file__is_replayed_on_two_workers(run: RunPlan) -> None:
    result = replay(run.run, steps=range(4, 9), num_workers=2)
    assert result.equal, result.verdict
    assert result.workers == 2


def test_a_checkpoint__is_a_folder_that_transformers_loads(run: RunPlan, tmp_path: Path) -> None:
    folder = last_checkpoint(run, tmp_path)
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    model = load_decoder(folder)
    assert parameter_hash(dict(model.named_parameters())) == read_metadata(folder).parameter_hash
    inputs = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = loaded(input_ids=inputs).logits
        assert torch.allclose(model.logits(model(inputs)), expected, atol=1e-5)
    tokenizer = Tokenizer.from_json(run.tokenizer_json)
    given = small("qwen3_moe", vocab_size=PADDED_VOCAB).values
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eot_id}
    stored = json.loads((folder / "config.json").read_bytes())
    added = {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}
    assert stored == given | ids | added, "without the name, vLLM would take it for no generator"
    assert AutoTokenizer.from_pretrained(folder).encode("tell me") == tokenizer.encode("tell me")


@pytest.mark.slow
def test_a_checkpoint__is_exported_and_evaluated_and_probed(
    run: RunPlan, ray_workers: int, tmp_path: Path
) -> None:
    checkpoint = RunCheckpoints(run.run).uri(RunCheckpoints(run.run).names[-1])
    validated = Ledger.read(run.run).events("validation")[-1]["val_loss"]
    assert evaluate(EvaluateConfig(checkpoint=checkpoint, batch_size=2))["loss"] == pytest.approx(
        validated, rel=1e-6
    )
    figures = export(checkpoint, str(tmp_path / "out"), storage_uri=run.config.storage.uri)
    assert figures["parameter_hash"] == hashes(run)[-1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {0 <= found["copy"] <= 1 for found in probe_run(run.run)["checkpoints"]} == {True}


def test_a_checkpoint__is_known_to_the_endpoint_and_served_by_vllm_alone(
    run: RunPlan, tmp_path: Path
) -> None:
    folder = last_checkpoint(run, tmp_path)
    served = read_served_model(folder, name=None, max_context=40)
    assert (served.config.n_positions, served.config.vocab_size) == (40, PADDED_VOCAB)
    assert is_of_one_kind(served, read_served_model(folder, name=None, max_context=40))
    with pytest.raises(UnsupportedModelError, match=r"'qwen3_moe'.*set engine\.backend to vllm"):
        load_model(folder)


def source_folder(folder: Path, plan: RunPlan, family: str) -> Path:
    """Returns a folder with a random model of a family that transformers saved."""
    torch.manual_seed(5)
    config = small(family, vocab_size=PADDED_VOCAB)
    model = AutoModelForCausalLM.from_config(config.hf, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_json(plan.tokenizer_json)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(plan.tokenizer_json)
    return folder


@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("gemma3_text", marks=pytest.mark.slow)]
)
def test_the_weights_of_a_saved_folder__are_step_0_of_a_run(family: str, tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path / "storage"), num_steps=3)
    source = source_folder(tmp_path / "source", plan, family)
    settings = plan.config.model_dump() | {"run_id": "begun", "model": {}}
    settings["train"]["init_from"] = str(source)
    config = like_its_source(RunConfig.model_validate(settings))
    assert isinstance(config.model, ForeignConfig)
    with pytest.raises(ConfigError, match="compute=cpu is for our own shapes"):
        like_its_source(
            RunConfig.model_validate(settings | {"train": settings["train"] | {"compute": "cpu"}})
        )
    plan = replace(plan, config=config)
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    first = last_checkpoint(plan, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(source)
    assert read_metadata(first).parameter_hash == parameter_hash(dict(saved.named_parameters()))
    train(plan, rank=0, world_size=1)
    assert len({read_metadata(first).parameter_hash, *hashes(plan)}) == 2

    # From a checkpoint of its own, too
    again = settings | {"run_id": "again"}
    again["train"]["init_from"] = str(last_checkpoint(plan, tmp_path / "last"))
    config = like_its_source(RunConfig.model_validate(again))
    plan = replace(plan, config=config)
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    assert read_metadata(last_checkpoint(plan, tmp_path / "new")).parameter_hash is not None


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows__is_refused(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    config = plan.config.model_copy(update={"model": small("qwen3", vocab_size=200)})
    with pytest.raises(ConfigError, match="the tokenizer has 300 ids"):
        _shape_for(config, Tokenizer.from_json(plan.tokenizer_json))


def test_saved_weights__that_do_not_fit__are_refused(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    source = source_folder(tmp_path / "source", plan, "qwen3")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    expected = r"missing keys in the weights: model\.layers\.2\.mlp\.up_proj\.weight;"
    with pytest.raises(ForeignModelError, match=expected):
        load_decoder(source)
