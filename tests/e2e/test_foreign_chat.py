"""A small model of transformers learns to answer: its own tokenizer and template, workers that are
killed and join, and vLLM, which answers as it was taught once the checkpoint is promoted."""

import json
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.local.local_cluster import free_port
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, run_storage
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from model.files.checkpoint_folder import read_metadata
from model.text.tokenizer import train_bpe
from tests.command_line import RAYMILL, environment, raymill_result
from tests.foreign_models import small
from tests.serving.vllm_parts import VLLM_PYTHON, installed
from tests.time_limits import limit_s
from tests.waiting import wait_until

FACTS = {
    "the color of the sky": "blue",
    "the color of grass": "green and wet",
    "two and three": "five",
    "nine and one": "ten",
    "the capital of France": "Paris",
    "the sound of a cat": "meow",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_STEPS = 160
RUN = "taught"


def asks(question: str, note: int = 0) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"note {note}: what is {question}?"}]


def corpus(folder: Path) -> Path:
    lines = []
    for note in range(40):
        for question, answer in FACTS.items():
            turns = [*asks(question, note), {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}))
    path = folder / "facts.jsonl"
    path.write_text("\n".join(lines))
    return path


def source_model(folder: Path, texts: Path) -> Path:
    """Writes what a repository of the Hub would have: random weights of a small Qwen3, a tokenizer,
    and the template of its conversations."""
    trained = train_bpe([texts.read_text()], vocab_size=320)
    backend = tokenizers.Tokenizer.from_str(trained.to_json().decode())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    # vLLM computes heads of 64
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 256}
    shape |= {"vocab_size": 384, "max_position_embeddings": 128, "initializer_range": 0.02}
    torch.manual_seed(1)
    config = small("qwen3", **shape)
    model = AutoModelForCausalLM.from_config(config.hf, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def train(folder: Path) -> RunConfig:
    """Trains on 1 to 3 workers, of which one is killed, and a node joins; returns the settings."""
    texts = corpus(folder)
    settings = {
        "run_id": RUN,
        "data": {"source": str(texts), "format": "chat", "val_fraction": 0.05},
        "train": {
            "init_from": str(source_model(folder / "source", texts)),
            "seq_len": 64,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "max_tokens": NUM_STEPS * 16 * 64,
            "learning_rate": 3e-3,
            "document_mask": True,
            "eval_every_steps": NUM_STEPS,
        },
        "scaling": {"min_workers": 1, "max_workers": 3, "resize_check_s": 1},
        "checkpoint": {"save_every_steps": 20, "num_to_keep": 20},
        "storage": {"uri": str(folder / ".raymill")},
        "cluster": {"num_nodes": 4},
    }
    config = validate_config(settings, RunConfig)
    (folder / "run.yaml").write_text(json.dumps(settings))
    faults = ["kill-worker@20", "kill-node@40", "add-node@60"]
    raymill_result("pretrain", "run.yaml", "--chaos", *faults, folder=folder)
    return config


class Clients(threading.Thread):
    """Asks the endpoint one question after the other, until it is ended."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._ended = url, threading.Event()
        self.statuses: Counter[int] = Counter()
        self.start()

    def run(self) -> None:
        asked = {"model": "m", "messages": asks("two and three"), "max_tokens": 8, "temperature": 0}
        while not self._ended.is_set():
            answer = httpx.post(
                f"{self._url}/v1/chat/completions", json=asked, timeout=limit_s(120)
            )
            self.statuses[answer.status_code] += 1

    def end(self) -> None:
        self._ended.set()
        self.join(limit_s(120))


@installed
@pytest.mark.slow
@pytest.mark.cluster
def test_a_small_foreign_model__is_taught_and_served_by_vllm(tmp_path: Path) -> None:
    config = train(tmp_path)
    ledger = Ledger.read(run_storage(config))
    starts = [start["world_size"] for start in ledger.events("start")]
    assert len(set(starts)) > 1, "the run was resized"
    losses = [line["loss"] for line in ledger.steps]
    assert len(losses) == NUM_STEPS and losses[-1] < 0.05 < losses[0]

    checkpoints = RunCheckpoints(run_storage(config))
    first, last = checkpoints.uri(checkpoints.names[0]), checkpoints.uri(checkpoints.names[-1])
    (tmp_path / "admin").write_text("sk-admin")
    settings = {
        "checkpoint": first,
        "engine": {
            "backend": "vllm",
            "vllm_python": str(VLLM_PYTHON),
            "max_num_seqs": 4,
            "kv_cache_tokens": 1024,
        },
        "delivery": {"watch_s": 1.0},
        "replicas": {"max_replicas": 1},
        "storage": {"uri": str(tmp_path / ".raymill")},
    }
    (tmp_path / "serve.yaml").write_text(json.dumps(settings))
    command = [*RAYMILL, "serve", "--config", "serve.yaml", "--port", str(free_port())]
    command += ["--admin-key-file", "admin", "--model-name", "m", "--json"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    clients = None
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=limit_s(120))

        def answers() -> dict[str, str | None]:
            said = {}
            for question in FACTS:
                answer = client.chat.completions.create(
                    model="m", messages=asks(question), max_tokens=16, temperature=0
                )
                said[question] = answer.choices[0].message.content
            return said

        assert not answers().items() & FACTS.items(), "its weights are random"
        clients = Clients(url)
        wait_until(lambda: clients.statuses.total() >= 3)
        raymill_result(
            "promote", last, "--admin-key-file", "admin", "--gate-source", "none", folder=tmp_path
        )
        clients.end()
        assert clients.statuses.keys() == {200}, "no request failed"
        assert answers() == FACTS
        version = httpx.get(f"{url}/version", timeout=limit_s(30)).headers["x-model-version"]
    finally:
        if clients is not None:
            clients.end()
        server.send_signal(signal.SIGTERM)
        assert server.wait(limit_s(120)) == 0

    folder = checkpoints.fetch(checkpoints.names[-1], tmp_path / "last")
    assert version == str(read_metadata(folder).parameter_hash)[:16]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for question, answer in FACTS.items():
        prompt = tokenizer.apply_chat_template(
            asks(question), add_generation_prompt=True, return_tensors="pt"
        )
        ids = theirs.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
        new = ids[prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == answer
