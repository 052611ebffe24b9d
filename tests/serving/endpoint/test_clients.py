"""Clients that others wrote, unchanged, against a real endpoint: lm-eval and `vllm bench serve` (openai is in
test_endpoint.py). Nothing is fetched."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.generate import generate
from model.gpt import GPT
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.repository import REPOSITORY
from tests.serving.hostile_requests import MODEL
from tests.time_limits import limit_s

VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
CHOICES = ["the quick brown fox", "over the lazy dog", "naïve cafés sell tea", "dog dog dog"]
QUESTIONS = ["the quick", "brown fox jumps", "sell €5", "lazy dog, and"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def run_client(command: list[str], *, folder: Path) -> None:
    environment = os.environ | OFFLINE | {"HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=limit_s(400), check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def write_tasks(folder: Path) -> None:
    lines = [json.dumps({"question": question, "choices": CHOICES}) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    going_on = {
        "task": "going_on",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choosing, going_on):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    [file] = folder.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


@torch.inference_mode()
def log_likelihood(model: GPT, context_ids: list[int], ids: list[int]) -> float:
    """Of `ids` after the context, from the logits of one forward pass."""
    logprobs = model.logits(model(torch.tensor([context_ids + ids])))[0].log_softmax(-1)
    return float(sum(logprobs[len(context_ids) - 1 + i, token_id] for i, token_id in enumerate(ids)))


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed; `make test-all` installs it")
def test_lm_eval_reads_what_the_model_says(
    open_url: str, checkpoint: Path, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    settings = {
        "model": MODEL,
        "base_url": f"{open_url}/v1/completions",
        "tokenizer": checkpoint,
        "tokenizer_backend": "huggingface",
        "max_length": 128,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "choosing,going_on"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    run_client(command, folder=tmp_path)

    for question, sample in zip(QUESTIONS, samples(tmp_path / "out", "choosing"), strict=True):
        context_ids = tokenizer.encode(question)
        for choice, [response] in zip(CHOICES, sample["resps"], strict=True):
            ids = tokenizer.encode(f"{question} {choice}")[len(context_ids) :]
            expected = log_likelihood(model, context_ids, ids)
            assert float(response[0]) == pytest.approx(expected, abs=1e-3), (question, choice, sample["arguments"])
    greedy = SamplingParams(temperature=0.0)
    for question, sample in zip(QUESTIONS, samples(tmp_path / "out", "going_on"), strict=True):
        ids = generate(model, tokenizer.encode(question), max_tokens=12, params=greedy, eos_id=tokenizer.eot_id)
        assert sample["resps"] == [[tokenizer.decode(ids).split("\n")[0]]]


@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vLLM in .venv-vllm; `make bench-serve` installs it")
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_vllm_bench_serve_gets_every_token(open_url: str, checkpoint: Path, tmp_path: Path, route: str) -> None:
    settings = {
        "--backend": "openai-chat" if "chat" in route else "openai",
        "--base-url": open_url,
        "--endpoint": route,
        "--model": MODEL,
        "--tokenizer": checkpoint,
        "--dataset-name": "random",
        "--random-input-len": 20,
        "--random-output-len": 8,
        "--num-prompts": 12,
        "--max-concurrency": 4,
        "--result-dir": tmp_path,
        "--result-filename": "result.json",
    }
    command = [str(VLLM_PYTHON), "-c", VLLM_BENCH, "--ignore-eos", "--save-result", "--disable-tqdm"]
    run_client([*command, *(str(word) for item in settings.items() for word in item)], folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (12, 0, 12 * 8)
    assert result["median_itl_ms"] > 0
