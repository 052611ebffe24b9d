"""Clients that others wrote, unchanged, each with its usual call, against a real endpoint. Nothing
is fetched. A browser is in test_cross_origin.py, and more of openai in test_endpoint.py."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.repository import REPOSITORY
from tests.serving.client_parts import (
    CLIENTS_PYTHON,
    SCRIPTS,
    greedy_text,
    installed,
    reply,
    run_client,
)
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
CHOICES = ["the quick brown fox", "over the lazy dog", "naïve cafés sell tea", "dog dog dog"]
QUESTIONS = ["the quick", "brown fox jumps", "sell €5", "lazy dog, and"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def num_sequences(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=limit_s(30)).text
    return sum(
        int(float(line.split()[-1]))
        for line in text.splitlines()
        if line.startswith("vllm:request_success_total{")
    )


def write_tasks(folder: Path, questions: list[str]) -> None:
    lines = [json.dumps({"question": question, "choices": CHOICES}) for question in questions]
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
    return float(
        sum(logprobs[len(context_ids) - 1 + i, token_id] for i, token_id in enumerate(ids))
    )


def mean_of(model: GPT, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids]))[0].mean(dim=0)


def assert_same_vector(found: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float32), expected, atol=1e-4, rtol=1e-4
    )


def test_openai_gets_vllms_fields_and_embeddings(
    open_url: str, model: GPT, tokenizer: Tokenizer
) -> None:
    texts = ["the quick fox", "naïve cafés sell €5 tea"]
    with openai.OpenAI(base_url=f"{open_url}/v1", api_key="none needed", max_retries=0) as client:
        asked: dict[str, Any] = {
            "return_token_ids": True,
            "min_tokens": 5,
            "stop_token_ids": [1],
            "prompt_logprobs": 2,
        }
        answer: Any = client.completions.create(
            model=MODEL, prompt=texts, max_tokens=9, temperature=0, logprobs=20, extra_body=asked
        )
        for text, choice in zip(texts, answer.choices, strict=True):
            assert choice.prompt_token_ids == tokenizer.encode(text) and len(choice.token_ids) >= 5
            assert len(choice.prompt_logprobs) == len(choice.prompt_token_ids)
            assert len(choice.logprobs.top_logprobs[0]) == 20
        for encoding in ("float", openai.omit):  # it asks for base64 by itself
            vectors = client.embeddings.create(model=MODEL, input=texts, encoding_format=encoding)
            for text, found in zip(texts, vectors.data, strict=True):
                assert_same_vector(found.embedding, mean_of(model, tokenizer.encode(text)))
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model=MODEL, input=texts, dimensions=8)


@installed
def test_litellm_completes_chats_and_embeds(
    open_url: str, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = json.loads(
        run_client(
            [str(CLIENTS_PYTHON), SCRIPTS / "litellm_answers.py", open_url, MODEL], folder=tmp_path
        )
    )
    expected = reply(model, tokenizer, [("User", "the quick fox")], max_tokens=12)
    assert found["chat"] == found["streamed"] == expected
    assert found["text"] == greedy_text(model, tokenizer, "the quick", max_tokens=12)
    for word, vector in zip(["fox", "lazy dog"], found["embeddings"], strict=True):
        assert_same_vector(vector, mean_of(model, tokenizer.encode(word)))


@installed
def test_langchain_holds_a_conversation_of_three_turns(
    open_url: str, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    questions = ["tea?", "a fox", "and?"]
    command = [str(CLIENTS_PYTHON), SCRIPTS / "langchain_answers.py", open_url, MODEL, *questions]
    found = json.loads(run_client(command, folder=tmp_path))
    turns = [("System", "be brief")]
    for question, answer in zip(questions, found["replies"], strict=True):
        turns.append(("User", question))
        assert answer == reply(model, tokenizer, turns, max_tokens=8)
        turns.append(("Assistant", answer))
    assert found["text"] == greedy_text(model, tokenizer, "the quick", max_tokens=12)
    for word, vector in zip(["fox", "lazy dog"], found["embeddings"], strict=True):
        assert_same_vector(vector, mean_of(model, tokenizer.encode(word)))


@installed
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures_every_request(
    open_url: str, checkpoint: Path, tmp_path: Path, route: str
) -> None:
    report = tmp_path / "report.json"
    settings = {
        "--backend": f"kind=openai_http,target={open_url},model={MODEL},request_format={route}",
        "--tokenizer": f"kind=hf_auto,model={checkpoint}",
        "--data": "kind=synthetic_text,prompt_tokens=20,output_tokens=8",
        "--profile": "kind=concurrent,streams=3",
        "--constraint": "kind=max_requests,count=9",
        "--output": f"kind=json,path={report}",
    }
    command = [str(CLIENTS_PYTHON), "-m", "guidellm", "run", "--disable-console"]
    run_client([*command, *(word for item in settings.items() for word in item)], folder=tmp_path)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (9, 0, 0)


@installed
@pytest.mark.parametrize("batch_size", [1, 256])
def test_lm_eval_reads_what_the_model_says(
    open_url: str,
    checkpoint: Path,
    model: GPT,
    tokenizer: Tokenizer,
    tmp_path: Path,
    batch_size: int,
) -> None:
    questions = (
        QUESTIONS
        if batch_size == 1
        else [f"{question} {i}" for i in range(32) for question in QUESTIONS]
    )
    write_tasks(tmp_path, questions)
    before = num_sequences(open_url)
    settings = {
        "model": MODEL,
        "base_url": f"{open_url}/v1/completions",
        "tokenizer": checkpoint,
        "tokenizer_backend": "huggingface",
        "max_length": 128,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    command = [
        str(CLIENTS_PYTHON),
        "-m",
        "lm_eval",
        "--model",
        "local-completions",
        "--tasks",
        "choosing,going_on",
    ]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += [
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    command += ["--batch_size", str(batch_size)]
    run_client(command, folder=tmp_path)

    assert num_sequences(open_url) - before == 5 * len(questions)
    for question, sample in zip(questions, samples(tmp_path / "out", "choosing"), strict=True):
        context_ids = tokenizer.encode(question)
        for choice, [response] in zip(CHOICES, sample["resps"], strict=True):
            ids = tokenizer.encode(f"{question} {choice}")[len(context_ids) :]
            expected = log_likelihood(model, context_ids, ids)
            assert float(response[0]) == pytest.approx(expected, abs=1e-3), (
                question,
                choice,
                sample["arguments"],
            )
    for question, sample in zip(questions, samples(tmp_path / "out", "going_on"), strict=True):
        assert sample["resps"] == [
            [greedy_text(model, tokenizer, question, max_tokens=12).split("\n")[0]]
        ]


@pytest.mark.skipif(
    not VLLM_PYTHON.exists(), reason="no vLLM in .venv-vllm; `make bench-serve` installs it"
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_vllm_bench_serve_gets_every_token(
    open_url: str, checkpoint: Path, tmp_path: Path, route: str
) -> None:
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
    command = [
        str(VLLM_PYTHON),
        "-c",
        VLLM_BENCH,
        "--ignore-eos",
        "--save-result",
        "--disable-tqdm",
    ]
    run_client(
        [*command, *(str(word) for item in settings.items() for word in item)], folder=tmp_path
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (12, 0, 12 * 8)
    assert result["median_itl_ms"] > 0
