"""A run that begins from weights that transformers wrote: they are its step 0, and a resume has the
same bits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.settings.parser import ConfigError
from cluster.settings.run import to_yaml
from cluster.storage.uris import open_storage
from jobs.pretrain import pretrain
from jobs.proof.replay_run import replay
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.history import changed_settings, recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan, run_storage
from jobs.tokens.train_tokenizer import load_tokenizer
from jobs.training.train_loop import train
from jobs.training.warm_start import begin, like_its_source
from model.config import GPTConfig
from model.files.bounded_text import TextError
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import read_metadata
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash
from tests.cluster.hub_stub import running_hub
from tests.jobs.runs import tiny_plan


def source_folder(folder: Path, tokenizer_json: bytes, **changes: Any) -> Path:
    """Returns a folder with a random Llama that transformers saved."""
    tokenizer = Tokenizer.from_json(tokenizer_json)
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return folder


def begun(tmp_path: Path, run_id: str, source: Path | str, **train_settings: Any) -> RunPlan:
    """Returns the plan of a run that has begun from a folder, as `pretrain` makes it."""
    plan = tiny_plan(str(tmp_path / "storage"), train={"init_from": str(source)} | train_settings)
    settings = plan.config.model_dump() | {"run_id": run_id, "model": {}}
    config = like_its_source(type(plan.config).model_validate(settings))
    plan = replace(plan, config=config)
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    return plan


def hashes(plan: RunPlan) -> list[str]:
    return [line["parameter_hash"] for line in Ledger.read(plan.run).events("checkpoint")]


@pytest.mark.more
def test_the_weights_of_a_folder_are_step_0_and_a_resume_has_the_bits_of_one_go(
    tmp_path: Path,
) -> None:
    tokenizer_json = tiny_plan(str(tmp_path / "storage")).tokenizer_json
    source = source_folder(tmp_path / "source", tokenizer_json)
    whole = begun(tmp_path, "whole", source)
    assert whole.config.model.architecture == "llama"
    checkpoints = RunCheckpoints(whole.run)
    first = checkpoints.fetch(checkpoints.names[0], tmp_path)
    expected = parameter_hash(load_model(source).state_dict())
    assert read_metadata(first).parameter_hash == expected
    train(whole, rank=0, world_size=1)
    parts = begun(tmp_path, "parts", source)
    train(replace(parts, until=5), rank=0, world_size=1)
    train(parts, rank=0, world_size=1)
    assert hashes(parts)[-1] == hashes(whole)[-1] != expected
    assert (
        changed_settings(
            parts.run, parts.config.model_copy(update={"model": type(parts.config.model)()})
        )
        == []
    )
    found = replay(run_storage(whole.config), steps=range(1, 9), num_workers=2)
    assert found.equal, found.verdict
    assert found.from_checkpoint == "step-000000000"


def test_a_model_on_the_hub_is_recorded_by_its_commit_and_its_branch_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_json = tiny_plan(str(tmp_path / "storage")).tokenizer_json
    source = source_folder(tmp_path / "source", tokenizer_json)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub("model") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.commit({file.name: file.read_bytes() for file in source.iterdir()})
        plan = begun(tmp_path, "from-the-hub", "hf://owner/texts@main")
        hub.commit({"config.json": b"{}"})
        pinned = f"hf://owner/texts@{commit}"
        assert recorded_config(plan.run).train.init_from == plan.config.train.init_from == pinned
        assert plan.config.data.tokenizer == pinned
        assert load_tokenizer(pinned)[0].to_json() == tokenizer_json
        checkpoints = RunCheckpoints(plan.run)
        begins = read_metadata(checkpoints.fetch(checkpoints.names[0], tmp_path)).parameter_hash
        assert begins == parameter_hash(load_model(source).state_dict())

        def changed(reference: str) -> list[str]:
            train = plan.config.train.model_copy(update={"init_from": reference})
            return changed_settings(plan.run, plan.config.model_copy(update={"train": train}))

        assert (
            changed("hf://owner/texts@main")
            == changed("hf://owner/texts@v1")
            == changed(pinned)
            == []
        )
        for other in (
            f"hf://owner/texts@{'0' * 40}",
            "hf://owner/others@main",
            "hf://owner/texts@main/nested",
        ):
            assert changed(other) == [f"train.init_from was {pinned}, now {other}"]


def test_a_run_whose_source_is_gone_resumes_with_the_tokenizer_of_its_step_0(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    source = source_folder(tmp_path / "source", plan.tokenizer_json)
    (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    train_config = plan.config.train.model_copy(update={"init_from": str(source)})
    asked = plan.config.model_copy(
        update={"run_id": "alone", "model": GPTConfig(), "train": train_config}
    )
    config, run = like_its_source(asked), run_storage(asked)
    before, _ = load_tokenizer(str(config.data.tokenizer))
    begin(run, config, before)
    run.write_bytes("config.yaml", to_yaml(config).encode())
    shutil.rmtree(source)
    resumed = like_its_source(asked)
    after, _ = load_tokenizer(str(resumed.data.tokenizer))
    assert before.chat is not None
    assert (after.to_json(), after.hash, after.chat) == (
        before.to_json(),
        before.hash,
        before.chat,
    ), "the store's key"
    assert (resumed.model, resumed.train) == (config.model, config.train)
    assert changed_settings(run, resumed) == []


@pytest.mark.more
def test_a_template_that_does_not_end_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """By the launcher, which would render it without end in its own process."""
    plan = tiny_plan(str(tmp_path / "storage"))
    source = source_folder(tmp_path / "source", plan.tokenizer_json)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (source / "chat_template.jinja").write_text(loop)
    train_config = plan.config.train.model_copy(update={"init_from": str(source)})
    asked = plan.config.model_copy(
        update={"run_id": "loops", "model": GPTConfig(), "train": train_config}
    )
    has_ray = ray.is_initialized()
    with pytest.raises(
        TextError, match=r"source/tokenizer\.json: .* 3 s of processor time .*chat_template\.jinja"
    ):
        pretrain(asked)
    assert ray.is_initialized() == has_ray and not run_storage(asked).list()


def test_a_run_without_its_first_checkpoint_never_begins_with_random_weights(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    source = source_folder(tmp_path / "source", plan.tokenizer_json)
    run = begun(tmp_path, "gone", source)
    for entry in run.run.list("checkpoints/"):
        run.run.delete(entry.key)
    train(run, rank=0, world_size=1)
    assert "step 0 is gone" in Ledger.read(run.run).events("gave_up")[-1]["reason"]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    source = source_folder(tmp_path / "source", plan.tokenizer_json)
    with pytest.raises(CheckpointError):
        begun(tmp_path, "none", tmp_path / "nothing")
    config = plan.config.model_copy(
        update={"train": plan.config.train.model_copy(update={"init_from": str(source)})}
    )
    with pytest.raises(ConfigError, match="architecture is gpt2, there llama"):
        begin(
            open_storage(str(tmp_path / "other")),
            like_its_source(config),
            Tokenizer.from_json(plan.tokenizer_json),
        )


def test_a_padded_vocabulary_is_refused_with_what_to_do_about_it(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path / "storage"))
    num_ids = Tokenizer.from_json(plan.tokenizer_json).vocab_size
    source = source_folder(tmp_path / "source", plan.tokenizer_json, vocab_size=num_ids + 7)
    expected = rf"{num_ids} ids and the embedding {num_ids + 7} rows.* model\.resize_token_embeddings\({num_ids}\)"
    with pytest.raises(ConfigError, match=expected):
        begun(tmp_path, "padded", source)
    model = LlamaForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(num_ids)
    model.save_pretrained(source)
    begun(tmp_path, "cut", source)
