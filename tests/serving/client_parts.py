"""What the tests of others' clients share: where the clients lie, how one is run, and what the
model says by itself."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

CLIENTS_PYTHON = REPOSITORY / ".venv-clients" / "bin" / "python"
SCRIPTS = REPOSITORY / "tests" / "serving" / "clients"
LLAMA_INDEX_PYTHON = REPOSITORY / ".venv-llama-index" / "bin" / "python"
NODE_CLIENTS = REPOSITORY / ".node-clients"
OFFLINE = {
    **dict.fromkeys(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "VLLM_NO_USAGE_STATS"), "1"
    ),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it asks GitHub for prices
    "LANGSMITH_TRACING": "false",
}
GREEDY = SamplingParams(temperature=0.0)
installed = pytest.mark.skipif(
    not CLIENTS_PYTHON.exists(), reason="no clients in .venv-clients; `make test-all` installs them"
)
llama_index_installed = pytest.mark.skipif(
    not LLAMA_INDEX_PYTHON.exists(),
    reason="no LlamaIndex in .venv-llama-index; `make test-all` installs it",
)
node_installed = pytest.mark.skipif(
    not (NODE_CLIENTS / ".installed").exists(),
    reason="no clients in .node-clients; `make test-all` installs them where npm is",
)


def run_client(command: Sequence[str | Path], *, folder: Path) -> str:
    """Returns what it prints."""
    environment = (
        os.environ | OFFLINE | {"HF_HOME": str(folder / "hf"), "LLM_USER_PATH": str(folder)}
    )
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit_s(400),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_node_client(script: str, *arguments: str, folder: Path) -> dict[str, Any]:
    """Returns the object that it prints, run by the Node that lies beside the clients."""
    [node] = NODE_CLIENTS.glob("node_modules/node-linux-*/bin/node")
    (folder / "node_modules").symlink_to(NODE_CLIENTS / "node_modules")
    shutil.copy(SCRIPTS / "node" / script, folder)
    answers: dict[str, Any] = json.loads(run_client([node, script, *arguments], folder=folder))
    return answers


def greedy_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_tokens: int) -> str:
    ids = generate(
        model,
        tokenizer.encode(prompt),
        max_tokens=max_tokens,
        params=GREEDY,
        eos_id=tokenizer.eot_id,
    )
    return tokenizer.decode(ids)


def spoken(turns: list[tuple[str, str]]) -> str:
    return "".join(f"{speaker}:\n{text}\n" for speaker, text in turns) + "Assistant:\n"


def reply(
    model: GPT, tokenizer: Tokenizer, turns: list[tuple[str, str]], *, max_tokens: int
) -> str:
    """What the model says next in a chat."""
    return greedy_text(model, tokenizer, spoken(turns), max_tokens=max_tokens).split("\nUser:")[0]
