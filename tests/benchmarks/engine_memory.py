"""The engine process of `bench_serving_memory`, without the modules of its driver: answers one
request after another.

    python -m tests.benchmarks.engine_memory engine|engine-without-prefixes

Prints a JSON object: its resident memory after so many requests.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from serving.engine.messages import SequenceRequest
from serving.engine_process.run_engine import build_engine
from tests.benchmarks.worker_memory import resident_bytes

NUM_REQUESTS, EVERY = 10_000, 250
PROMPT_TOKENS, NEW_TOKENS = 60, 3
CONFIG = GPTConfig(
    architecture="llama",
    activation_function="swiglu",
    vocab_size=256,
    n_positions=8192,
    n_layer=2,
    n_head=4,
    n_kv_head=4,
    n_embd=128,
)
# Of 16 whole contexts, the default
CACHE_MB = 4e-6 * 2 * CONFIG.n_layer * CONFIG.n_embd * 16 * CONFIG.n_positions
WITH_PREFIXES, WITHOUT_PREFIXES = "engine", "engine-without-prefixes"


@dataclass(frozen=True)
class EngineMemory:
    """An engine's resident memory after so many requests."""

    num_requests: Sequence[int]
    resident_mb: Sequence[float]


def memory_of_engine(*, keep_prefixes: bool) -> EngineMemory:
    """Lets an engine answer prompts that have nothing in common, one at a time."""
    model = GPT(CONFIG)
    model.init_weights(0)
    config = EngineConfig(dtype="float32", prefix_cache=keep_prefixes)
    engine = build_engine(model.eval(), config, eos_id=None, threads=1)
    rng, greedy = random.Random(0), SamplingParams(temperature=0.0)
    numbers, resident_mb = [], []
    for number in range(NUM_REQUESTS + 1):
        prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.submit(SequenceRequest(number, prompt, NEW_TOKENS, greedy))
        while engine.has_work:
            engine.step()
        if number % EVERY == 0:
            numbers.append(number)
            resident_mb.append(round(resident_bytes() / 1e6, 1))
    return EngineMemory(numbers, resident_mb)


def main() -> None:
    print(json.dumps(asdict(memory_of_engine(keep_prefixes=sys.argv[1] == WITH_PREFIXES))))


if __name__ == "__main__":
    main()
