"""Runs of a LoRA adapter: the base is frozen and stored once, checkpoints are the adapter alone, which
PEFT loads, and a resume, a replay and other workers have the same bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.cli import main
from cluster.settings.parser import ConfigError
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, to_yaml
from cluster.settings.stages import EvaluateConfig
from cluster.storage.bases import find_base
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.plan.make_plan import make_plan
from jobs.proof.replay_run import replay
from jobs.publishing.model_card import Origin, model_card
from jobs.report.probe_run import probe_run
from jobs.run.base import recorded_base
from jobs.run.history import changed_settings, recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from jobs.training.warm_start import begin, like_its_source
from model.adapters.lora import Adapter, AdapterError
from model.config import GPTConfig
from model.files.checkpoint import load_decoder, load_model, stored_weights
from model.files.checkpoint_folder import read_metadata, verify_checkpoint
from model.files.hf_config import UnsupportedModelError, read_shape
from model.foreign_config import ForeignConfig
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash
from tests.jobs.runs import newest_checkpoint, tiny_plan
from tests.jobs.saved_models import saved


def begun(folder: Path, run_id: str, source: Path | str, **train_settings: Any) -> RunPlan:
    """Returns the plan of a run of an adapter that has begun, as `pretrain` makes it."""
    settings = {"init_from": str(source), "lora_rank": 4} | train_settings
    plan = tiny_plan(str(folder / "storage"), train=settings)
    values = plan.config.model_dump() | {"run_id": run_id, "model": {}}
    config = like_its_source(RunConfig.model_validate(values))
    plan = replace(plan, config=config)
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    return replace(plan, base=recorded_base(plan.run))


def last_hash(plan: RunPlan) -> str:
    return str(Ledger.read(plan.run).events("checkpoint")[-1]["parameter_hash"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer_json = tiny_plan(str(folder / "storage")).tokenizer_json
    for family in ("qwen3", "gpt2"):
        saved(folder / family, tokenizer_json, family)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> RunPlan:
    """A run of an adapter of a Qwen3, trained to its end."""
    plan = begun(folder, "whole", folder / "qwen3", layer_statistics_every_steps=4)
    train(plan, rank=0, world_size=1)
    return plan


def test_an_adapter__learns_while_its_base_stays(run: RunPlan) -> None:
    losses = [line["loss"] for line in Ledger.read(run.run).steps]
    assert losses[-1] < losses[0] - 0.2
    assert run.base is not None
    base = run.base.folder(run.config.storage.uri)
    assert verify_checkpoint(base, to_train=False) == []
    assert parameter_hash(stored_weights(base)) == run.base.parameter_hash
    assert changed_settings(run.run, run.config.model_copy(update={"model": GPTConfig()})) == []
    assert recorded_config(run.run).model == run.config.model
    other = run.config.train.model_copy(update={"lora_rank": 8})
    changed = run.config.model_copy(update={"train": other})
    assert changed_settings(run.run, changed) == ["train.lora_rank was 4, now 8"]


def test_a_checkpoint__is_the_adapter_alone_with_its_base_s_identity(run: RunPlan) -> None:
    checkpoint = newest_checkpoint(run)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} < names
    assert "model.safetensors" not in names
    metadata = read_metadata(checkpoint)
    assert run.base is not None
    assert (metadata.base, metadata.base_hash) == (run.base.uri, run.base.parameter_hash)
    weights = sum(values.numel() for values in stored_weights(checkpoint).values())
    size = (checkpoint / "train_state.safetensors").stat().st_size
    assert 8 * weights < size < 8 * weights + 16_000  # two moments of these in fp32, and names
    shape = read_shape(checkpoint)
    assert isinstance(shape, ForeignConfig)
    assert shape.adapter is not None
    assert (shape.adapter.rank, shape.adapter.alpha) == (4, 8)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_checkpoint__is_loaded_by_peft_and_computes_as_the_merged_export(
    family: str, folder: Path, run: RunPlan, tmp_path: Path
) -> None:
    plan = run
    if family == "gpt2":  # whose matrices lie the other way round
        plan = begun(folder, "gpt2", folder / family, lora_alpha=12, lora_targets=["c_attn"])
        train(plan, rank=0, world_size=1)
    checkpoint, uri = newest_checkpoint(plan), plan.config.storage.uri
    merged, copy = tmp_path / "merged", tmp_path / "copy"
    export(str(checkpoint), str(merged), storage_uri=uri, merge=True)
    export(str(checkpoint), str(copy), storage_uri=uri)
    ids = torch.arange(40).view(2, 20)
    before = AutoModelForCausalLM.from_pretrained(folder / family)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
        plain = before(input_ids=ids).logits
        for place in (checkpoint, copy):
            adapted = PeftModel.from_pretrained(before, place)
            assert torch.allclose(adapted(input_ids=ids).logits, whole, atol=1e-5)
            before = adapted.unload()
        ours = load_decoder(checkpoint, base=find_base(checkpoint, uri))
        assert torch.allclose(ours.logits(ours(ids)), whole, atol=1e-5)
    assert (plain - whole).abs().max() > 0.05
    assert read_metadata(merged).base is None
    assert not (copy / "train_state.safetensors").exists()
    with pytest.raises(CheckpointError, match="--merge is for adapters"):
        export(str(merged), str(tmp_path / "again"), storage_uri=uri, merge=True)


def test_the_line_that_export_tells_to_type__loads_the_adapter(
    run: RunPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, uri = str(tmp_path / "an adapter"), run.config.storage.uri
    assert main(["export", str(newest_checkpoint(run)), folder, "--storage.uri", uri]) == 0
    told = capsys.readouterr().err.splitlines()[-1].removeprefix("next: in Python, ")
    modules, _, loading = told.partition("; ")
    known: dict[str, Any] = {}
    exec(modules, known)
    model = eval(loading, known)
    assert isinstance(model, PeftModel)


def test_what_strangers_get_of_an_adapter__names_no_place_of_one_s_own(
    run: RunPlan, tmp_path: Path
) -> None:
    checkpoint, uri = newest_checkpoint(run), run.config.storage.uri
    export(str(checkpoint), str(tmp_path / "there"), storage_uri=uri, is_public=True)
    for name in ("raymill.json", "adapter_config.json", "config.json"):
        assert str(tmp_path.parent) not in (tmp_path / "there" / name).read_text()
    described = read_metadata(tmp_path / "there")
    assert run.base is not None
    assert (described.base, described.base_hash) == (None, run.base.parameter_hash)
    with pytest.raises(CheckpointError, match="does not say where its base is"):
        find_base(tmp_path / "there", uri)
    tokenizer = Tokenizer.from_json(run.tokenizer_json)
    card = model_card(
        "owner/name",
        shape=read_shape(checkpoint),
        tokenizer=tokenizer,
        metadata=described,
        origin=Origin("Qwen/Qwen3-0.6B"),
        license_id="mit",
    )
    for part in ("library_name: peft", "base_model: Qwen/Qwen3-0.6B", "of rank 4, beside"):
        assert part in card
    assert 'PeftModel.from_pretrained(base, "owner/name")' in card


def test_a_base_on_the_hub__is_named_as_peft_names_it() -> None:
    stored = Adapter(4, 8, ("q_proj",)).to_peft("hf://Qwen/Qwen3-0.6B@abc")
    assert stored["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert stored["revision"] == "abc"


def test_a_resumed_run__has_the_bits_of_one_go_and_shares_its_base(
    run: RunPlan, folder: Path
) -> None:
    parts = begun(folder, "parts", folder / "qwen3")
    assert parts.base == run.base
    train(replace(parts, until=5), rank=0, world_size=1)
    train(parts, rank=0, world_size=1)
    assert last_hash(parts) == last_hash(run)
    again = like_its_source(parts.config.model_copy(update={"model": GPTConfig()}))
    assert again.model == run.config.model
    assert run.base is not None
    assert again.data.tokenizer == parts.config.data.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_a_replay_on_two_workers__has_the_same_bits(shard: str, run: RunPlan, folder: Path) -> None:
    scaling = run.config.scaling.model_copy(update={"shard": shard})
    config = run.config.model_copy(update={"scaling": scaling})
    run.run.write_bytes("config.yaml", to_yaml(config).encode())
    found = replay(run.run, steps=range(2, 9), num_workers=2)
    assert found.equal, found.verdict


@pytest.mark.slow
def test_evaluate_and_probe__merge_the_adapter(run: RunPlan, ray_workers: int) -> None:
    checkpoint = str(newest_checkpoint(run))
    storage = {"uri": run.config.storage.uri}
    config = EvaluateConfig.model_validate(
        {"checkpoint": checkpoint, "batch_size": 2, "storage": storage}
    )
    result = evaluate(config)
    expected = Ledger.read(run.run).events("validation")[-1]["val_loss"]
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    assert probe_run(run.run)["checkpoints"][-1]["step"] == 8


def test_an_adapter_of_an_adapter__stands_on_the_merged_weights(
    run: RunPlan, folder: Path, tmp_path: Path
) -> None:
    checkpoint, uri = newest_checkpoint(run), run.config.storage.uri
    second = begun(folder, "second", checkpoint)
    merged = load_decoder(checkpoint, base=find_base(checkpoint, uri))
    assert second.base is not None
    assert second.base.parameter_hash == parameter_hash(dict(merged.named_parameters()))


def test_a_base_that_was_moved_with_its_storage__is_found_and_another_one_refused(
    run: RunPlan, tmp_path: Path
) -> None:
    checkpoint = newest_checkpoint(run)
    storage = Path(run.config.storage.uri)
    [name] = [
        path.name
        for path in (storage / "bases").iterdir()
        if run.base and path.name in run.base.uri
    ]
    moved = tmp_path / "bases" / name
    moved.mkdir(parents=True)
    for file in (storage / "bases" / name).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert find_base(checkpoint, str(tmp_path)) == moved
    described = json.loads((moved / "raymill.json").read_text())
    described["parameter_hash"] = "0" * 64
    content = json.dumps(described).encode()
    (moved / "raymill.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"raymill\.json"):
        find_base(checkpoint, str(tmp_path))


def test_what_an_adapter_cannot_be__is_refused_by_name(run: RunPlan, folder: Path) -> None:
    values = run.config.model_dump()
    with pytest.raises(ValueError, match=r"needs weights to stand on: set train\.init_from"):
        RunConfig.model_validate(values | {"train": values["train"] | {"init_from": None}})
    with pytest.raises(ValueError, match=r"train\.lora_alpha is for an adapter"):
        RunConfig.model_validate(
            values | {"train": values["train"] | {"lora_rank": None, "lora_alpha": 3}}
        )
    with pytest.raises(ValueError, match=r"train\.compute=compiled is for whole models"):
        RunConfig.model_validate(values | {"train": values["train"] | {"compute": "compiled"}})
    with pytest.raises(AdapterError, match=r"'query'.*expected some of down_proj"):
        begun(folder, "unknown", folder / "qwen3", lora_targets=["query"])
    with pytest.raises(CheckpointError, match="computes nothing without its base"):
        load_decoder(newest_checkpoint(run))
    with pytest.raises(UnsupportedModelError, match="export --merge"):
        load_model(newest_checkpoint(run))
    plan = tiny_plan(str(folder / "storage"), train={"init_from": str(folder / "qwen3")})
    settings = plan.config.train.model_copy(update={"lora_rank": 4})
    wide = plan.config.model_copy(update={"train": settings, "run_id": "shaped"})
    with pytest.raises(ConfigError, match="which brings its shape"):
        like_its_source(wide)


def test_an_adapter_that_is_no_plain_one__is_refused() -> None:
    plain = Adapter(4, 8, ("q_proj",)).to_peft(None)
    assert Adapter.from_peft(plain) == Adapter(4, 8, ("q_proj",))
    for change in ({"use_dora": True}, {"bias": "all"}, {"target_modules": "all-linear"}):
        with pytest.raises(AdapterError, match="expected a plain LoRA"):
            Adapter.from_peft(plain | change)


def test_the_plan_of_an_adapter__counts_the_base_and_a_small_state() -> None:
    shape = {"preset": "gpt2-355m"}
    settings = {"max_tokens": 10_000_000, "init_from": "there", "precision": "bf16"}
    options = PlanConfig(gpu="h100", count=8)

    def memory(shard: str = "none", **more: Any) -> dict[str, float]:
        values = {
            "model": shape,
            "train": settings | more,
            "scaling": {"max_workers": 8, "shard": shard, "use_gpu": True},
        }
        parts = make_plan(RunConfig.model_validate(values), options)["memory_bytes"]
        assert isinstance(parts, dict)
        return parts

    whole, adapter = memory(), memory(lora_rank=16)
    divided = memory("parameters", lora_rank=16)
    assert adapter["optimizer"] < whole["optimizer"] / 30
    assert adapter["frozen"] == pytest.approx(whole["weights"], rel=0.01)
    assert divided["frozen"] < adapter["frozen"] / 2
