"""Who computes is decided by the device, and settings that the engine does not have are refused
with a word."""

import argparse
from pathlib import Path

import pytest

from cluster.settings.flags import add_config_arguments, resolve_config
from cluster.settings.parser import ConfigError, Parser
from cluster.settings.serve import NOT_VLLM_ARGS, EngineConfig, ServeConfig


def settled(*flags: str, yaml: str = "", folder: Path) -> ServeConfig:
    file = folder / "serve.yaml"
    file.write_text(yaml or "{}")
    parser: argparse.ArgumentParser = Parser()
    parser.add_argument("config", type=Path)
    add_config_arguments(parser, ServeConfig)
    given = parser.parse_args([str(file), *flags])
    return resolve_config(vars(given), ServeConfig, file=file).config


@pytest.mark.parametrize(
    ("device", "backend", "is_vllm"),
    [
        ("cpu", "auto", False),
        ("cpu", "raymill", False),
        ("cpu", "vllm", True),
        ("cuda", "auto", True),
    ],
)
def test_a_gpu_is_vllms_and_a_cpu_raymills(device: str, backend: str, is_vllm: bool) -> None:
    assert EngineConfig.model_validate({"device": device, "backend": backend}).runs_vllm is is_vllm


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{device: cuda, backend: raymill}", "expected backend auto or vllm"),
        ("{vllm_args: {enforce_eager: true}}", "expected backend=vllm or device=cuda"),
        ("{tensor_parallel_size: 2}", "expected backend=vllm or device=cuda"),
        ("{backend: vllm, batch_invariant: true}", "batch_invariant needs device=cuda"),
        (
            "{device: cuda, vllm_args: {max_num_seqs: 8}}",
            "cannot have max_num_seqs: set engine.max_num_seqs",
        ),
        ("{device: cuda, vllm_args: ['{1']}", "expected one JSON object"),
        ("{device: cuda, vllm_args: 3}", "engine.vllm_args: expected .*, not 3"),
    ],
)
def test_what_the_engine_lacks_is_refused(engine: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        settled(yaml=f"engine: {engine}", folder=tmp_path)


def test_vllms_arguments_come_from_the_file_or_as_json(tmp_path: Path) -> None:
    expected = {"gpu_memory_utilization": 0.4, "compilation_config": {"mode": 0}}
    in_file = settled(
        yaml="engine: {device: cuda, vllm_args: {gpu_memory_utilization: 0.4, compilation_config: {mode: 0}}}",
        folder=tmp_path,
    )
    text = '{"gpu_memory_utilization": 0.4, "compilation_config": {"mode": 0}}'
    flags = [
        settled("--engine.device", "cuda", "--engine.vllm-args", *words, folder=tmp_path)
        for words in ([text], text.split())
    ]
    assert [config.engine.vllm_args for config in (in_file, *flags)] == [expected] * 3


def test_every_refusal_says_what_to_do_instead() -> None:
    settings = {f"engine.{name}" for name in EngineConfig.model_fields} | set(
        ServeConfig.model_fields
    )
    settings |= {"replicas.max_replicas"}
    for instead in NOT_VLLM_ARGS.values():
        if instead.startswith("set "):
            assert instead.removeprefix("set ") in settings


def test_a_gpu_takes_on_more_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    cpu, gpu = settled(folder=tmp_path), settled("--engine.device", "cuda", folder=tmp_path)
    assert (cpu.max_ongoing_requests, cpu.target_ongoing_requests, cpu.engine.waiting_room) == (
        64,
        8,
        128,
    )
    assert (gpu.max_ongoing_requests, gpu.target_ongoing_requests, gpu.engine.waiting_room) == (
        1024,
        128,
        1024,
    )
    own = settled(
        "--engine.max-waiting", "0", "--replicas.max-ongoing-requests", "5", folder=tmp_path
    )
    assert (own.max_ongoing_requests, own.engine.waiting_room) == (5, 0)
