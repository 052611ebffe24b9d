"""The configuration tree: what fits together, what is refused and in which words, and that YAML
keeps all of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.settings.flags import read_config, validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import (
    RunConfig,
    ScalingConfig,
    batch_schedule,
    max_steps,
    seq_len,
    to_yaml,
    way_to_compute,
    with_precision,
    write_config,
)
from cluster.settings.serve import ServeConfig
from cluster.settings.stages import EvaluateConfig
from model.config import GPTConfig
from tests.foreign_models import small
from tests.repository import REPOSITORY


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        validate_config(values, RunConfig)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@given(
    lanes=st.integers(1, 64),
    micro_batch_size=st.integers(1, 16),
    length=st.integers(1, 64),
    surplus=st.integers(0, 10_000),
)
def test_steps_use_the_tokens_up_and_never_exceed_them(
    lanes: int, micro_batch_size: int, length: int, surplus: int
) -> None:
    tokens = lanes * micro_batch_size * length
    train = {
        "global_batch_size": lanes * micro_batch_size,
        "micro_batch_size": micro_batch_size,
        "seq_len": length,
        "max_tokens": tokens + surplus,
    }
    config = validate_config(
        {"model": {"preset": "tiny"}, "train": train, "scaling": {"max_workers": lanes}},
        RunConfig,
    )
    schedule = batch_schedule(config)
    assert {schedule.num_lanes(step) for step in (1, 2, 10**9)} == {lanes}
    assert schedule.step_tokens(7) == tokens
    assert schedule.tokens_seen(7) == 7 * tokens
    assert max_steps(config) * tokens <= tokens + surplus < (max_steps(config) + 1) * tokens


def test_sequences_are_as_long_as_the_context_unless_said() -> None:
    assert seq_len(validate_config({"model": {"preset": "tiny"}}, RunConfig)) == 64
    assert (
        seq_len(validate_config({"model": {"preset": "tiny"}, "train": {"seq_len": 7}}, RunConfig))
        == 7
    )


def test_fields_override_their_preset() -> None:
    config = validate_config(
        {"model": {"preset": "tiny", "n_layer": 3, "activation_function": "relu"}}, RunConfig
    )
    assert config.model == GPTConfig(
        n_layer=3, n_head=2, n_embd=32, n_positions=64, activation_function="relu"
    )


@pytest.mark.parametrize(
    "config",
    [
        validate_config(
            {
                "run_id": "a.run-1",
                "data": {
                    "source": ["/a/*.txt", "s3://b/c"],
                    "normalize": ["nfc"],
                    "tokenizer": "/t",
                    "validation": {"news-1.a": "/n.txt"},
                },
                "model": {
                    "preset": "tiny",
                    "n_inner": 65,
                    "dropout": 0.1,
                    "tie_word_embeddings": False,
                },
                "train": {
                    "learning_rate": 1e-3,
                    "warmup_tokens": 0,
                    "sample_prompts": ["a: b\n# c", "no", "∂"],
                },
                "scaling": {"min_workers": 2, "max_workers": 8},
            },
            RunConfig,
        ),
        ServeConfig(model_name="123", port=1, api_key_file="~"),
        EvaluateConfig(checkpoint="null", precision="bf16"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_yaml_keeps_everything(config: Any, tmp_path: Path) -> None:
    assert validate_config(yaml.safe_load(to_yaml(config)), type(config)) == config
    write_config(config, tmp_path / "run.yaml")
    assert read_config(tmp_path / "run.yaml", type(config)) == config


def test_the_configurations_in_the_repository_are_valid() -> None:
    paths = list((REPOSITORY / "jobs" / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        read_config(path, RunConfig)


def test_a_tree_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        RunConfig().train.seed = 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, ["unknown setting trian", "did you mean train?"]),
        (
            {"train": {"learning_rat": 1}},
            ["unknown setting train.learning_rat", "did you mean train.learning_rate?"],
        ),
        ({"train": {"qqq": 1}}, ["unknown setting train.qqq"]),
        ({"model": {"n_heads": 2}}, ["'n_heads'", "n_head,"]),
        ({"model": {"preset": "tinny"}}, ["'tinny'", "tiny"]),
        ({"model": {"n_embd": 32, "n_head": 3}}, ["n_head=3", "n_embd=32", "divisors"]),
        ({"model": {"n_layer": 2.5}}, ["model.n_layer", "a whole number", "2.5"]),
        (
            {"model": {"activation_function": "gelo"}},
            ["activation_function", "'gelo'", "gelu_exact"],
        ),
        (
            {"train": {"global_batch_size": 10, "micro_batch_size": 4}},
            ["train.micro_batch_size=4", "train.global_batch_size=10"],
        ),
        (
            {
                "train": {"global_batch_size": 8, "micro_batch_size": 4},
                "scaling": {"max_workers": 3},
            },
            ["scaling.max_workers=3", "2 lanes"],
        ),
        (
            {"model": {"preset": "tiny"}, "train": {"seq_len": 65}},
            ["train.seq_len=65", "model.n_positions=64"],
        ),
        (
            {"model": {"preset": "tiny"}, "train": {"max_tokens": 4095}},
            ["train.max_tokens=4095", "4096"],
        ),
        (
            {"train": {"batch_ramp_tokens": 10**5, "batch_ramp_start": 8}},
            ["scaling.max_workers=2", "1 lane ", "train.batch_ramp_start"],
        ),
        (
            {"train": {"batch_ramp_tokens": 10**5}},
            ["train.batch_ramp_tokens", "train.batch_ramp_start", "both"],
        ),
        (
            {"train": {"batch_ramp_start": 16}},
            ["train.batch_ramp_tokens", "train.batch_ramp_start", "both"],
        ),
        (
            {"train": {"batch_ramp_tokens": 10**5, "batch_ramp_start": 12}},
            ["train.batch_ramp_start=12", "multiple", "train.micro_batch_size=8"],
        ),
        (
            {"train": {"batch_ramp_tokens": 10**5, "batch_ramp_start": 64}},
            ["train.batch_ramp_start=64", "less than", "train.global_batch_size=64"],
        ),
        ({"train": {"schedule": "linear"}}, ["train.schedule", "'cosine' or 'wsd'", "'linear'"]),
        ({"train": {"cooldown_tokens": 5}}, ["train.cooldown_tokens=5", "train.schedule=wsd"]),
        (
            {
                "train": {
                    "schedule": "wsd",
                    "cooldown_tokens": 60,
                    "warmup_tokens": 50,
                    "decay_tokens": 100,
                }
            },
            ["train.cooldown_tokens=60", "train.warmup_tokens=50", "100 tokens"],
        ),
        ({"data": {"validation": {"a/b": "x.txt"}}}, ["data.validation.a/b", "letters, digits"]),
        (
            {"data": {"near_dedup_threshold": 0.05}},
            ["data.near_dedup_threshold", "at least 0.1", "0.05"],
        ),
        ({"scaling": {"min_workers": 3}}, ["min_workers=3", "max_workers=2"]),
        ({"train": {"learning_rate": -1}}, ["train.learning_rate", "more than 0", "-1"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate", "finite"]),
        ({"train": {"precision": "fp16"}}, ["train.precision", "'fp32' or 'bf16'", "'fp16'"]),
        ({"train": None}, ["train:", "None"]),
        ({"run_id": "../up"}, ["run_id", "'../up'"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_its_numbers(
    values: dict[str, Any], words: list[str]
) -> None:
    message = refusal(values)
    assert all(word in message for word in words), message


def test_every_problem_is_named_at_once() -> None:
    message = refusal({"train": {"seed": -1, "beta1": 1.0}, "scalling": {}})
    assert all(word in message for word in ("train.seed", "train.beta1", "scalling"))


@given(st.integers(1, 200), st.integers(1, 64))
def test_a_group_is_never_smaller_than_asked_for(world_size: int, asked: int) -> None:
    """A run that fits on groups of eight may not fit on the five that divide a world of fifteen."""
    size = ScalingConfig(shard="parameters", shard_group=asked).group_size(world_size)
    assert world_size % size == 0
    assert size >= min(asked, world_size)
    assert all(world_size % smaller for smaller in range(asked, size))


def test_a_config_file__is_the_models_shape_and_its_content_is_recorded(tmp_path: Path) -> None:
    foreign = small("qwen3")
    file = tmp_path / "config.json"
    file.write_text(foreign.content)
    config = validate_config({"model": {"config": str(file)}, "train": {"seq_len": 32}}, RunConfig)
    assert config.model == foreign
    assert way_to_compute(config) == "plain"
    file.unlink()
    write_config(config, tmp_path / "run.yaml")
    assert read_config(tmp_path / "run.yaml", RunConfig) == config


def test_a_config_file__of_a_shape_of_ours__is_computed_by_our_code(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    config = validate_config({"model": {"config": str(file)}}, RunConfig)
    assert isinstance(config.model, GPTConfig)
    assert (config.model.architecture, config.model.n_layer) == ("llama", 2)


@pytest.mark.parametrize(
    ("model", "train", "problem"),
    [
        (
            {"config": "CONFIG", "n_layer": 3, "preset": "tiny"},
            {},
            "so n_layer, preset must not be",
        ),
        ({"config": "CONFIG"}, {"compute": "cpu"}, "train.compute=cpu is for our own shapes"),
        ({"config": "CONFIG"}, {"compute": "portable"}, "compute=portable is for our own shapes"),
        ({"config": "EXPERTS"}, {"compute": "compiled"}, "a model of type 'qwen3_moe' chooses"),
        ({"config": "CONFIG"}, {"seq_len": 65}, "train.seq_len=65 exceeds model.n_positions=64"),
        ({"config": "FOLDER/none.json"}, {}, "does not exist; name a config.json"),
        ({"config": "FOLDER"}, {}, "cannot be read"),
        ({"config": "FOLDER/text"}, {}, "is not JSON"),
        ({"config": "FOLDER/list"}, {}, "holds no settings"),
    ],
)
def test_a_config_file__that_does_not_fit__is_said(
    tmp_path: Path, model: dict[str, Any], train: dict[str, Any], problem: str
) -> None:
    (tmp_path / "config.json").write_text(small("qwen3").content)
    (tmp_path / "text").write_text("{")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "experts.json").write_text(small("qwen3_moe").content)
    words = {"CONFIG": f"{tmp_path}/config.json", "EXPERTS": f"{tmp_path}/experts.json"}
    words |= {"FOLDER": f"{tmp_path}"}
    place = model["config"]
    for word, path in words.items():
        place = place.replace(word, path)
    assert problem in refusal({"model": model | {"config": place}, "train": train})


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"train": {"precision": "bf16"}}, "train.precision is bf16; leave it out"),
        ({"train": {"exact": False}}, "leave out train.exact=false"),
        ({"train": {"lora_rank": 4, "init_from": "base"}}, "asks for an adapter"),
        ({"model": {"preset": "tiny", "dropout": 0.1}}, "model.dropout is 0.1; set it to 0"),
        ({"scaling": {"use_gpu": True}}, "is for CPUs, and scaling.use_gpu is set"),
    ],
)
def test_portable_kernels__for_what_they_do_not_compute__refuse_it(
    changed: dict[str, Any], problem: str
) -> None:
    values = {**changed, "train": {"compute": "portable"} | changed.get("train", {})}
    assert problem in refusal(values)


def test_portable_kernels__compute_in_fp32_wherever_bf16_is_fast() -> None:
    portable = RunConfig.model_validate({"train": {"compute": "portable"}})
    assert with_precision(portable, "bf16").train.precision == "fp32"
