"""vLLM in the environment that `make bench-serve` installs for it, models that it takes, and what
its processes hold."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.settings.serve import EngineConfig
from model.architecture import ArchitectureName
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.repository import REPOSITORY
from tests.serving.tiny_models import lively_model

VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
installed = pytest.mark.skipif(
    not VLLM_PYTHON.exists(), reason="no vLLM in .venv-vllm; `make bench-serve` installs it"
)
SAMPLE_S = 0.05


def vllm_config(**settings: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "backend": "vllm",
            "vllm_python": str(VLLM_PYTHON),
            "max_num_seqs": 4,
            "kv_cache_tokens": 1024,
        }
        | settings
    )


def vllm_model(tokenizer: Tokenizer, *, seed: int, architecture: ArchitectureName = "gpt2") -> GPT:
    """With heads of 64, as narrower ones are not vLLM's."""
    return lively_model(tokenizer, n_embd=128, spread=0.2, seed=seed, architecture=architecture)


def memory_bytes(process: psutil.Process) -> int:
    """What the process and its children have in memory, each page that several of them share
    counted once (PSS)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_full_info().pss
    return total


class Peak:
    """The most that a process tree had in memory."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak_memory(process: psutil.Process) -> Iterator[Peak]:
    peak, ending = Peak(), threading.Event()

    def watch() -> None:
        while not ending.wait(SAMPLE_S):
            peak.bytes = max(peak.bytes, memory_bytes(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ending.set()
        thread.join()
