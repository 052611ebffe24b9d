"""The cost of `engine.dtype`: a text's perplexity in float32, bfloat16 and int8, by the engine's
own log-probabilities.

    python -m tests.benchmarks.bench_precision CHECKPOINT TEXT [--max-tokens 20000]

The text is read in rows of a whole context, each from an empty one. Prints a line for each
precision and, last, one JSON object.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from cluster.output.progress import say
from cluster.settings.serve import EngineConfig
from model.files.checkpoint import load_model
from model.files.stored_tokenizer import load_tokenizer
from model.generation.sampling_params import SamplingParams
from serving.engine.messages import SequenceRequest
from serving.engine.runner import LOADED_IN
from serving.engine_process.run_engine import build_engine

GREEDY = SamplingParams(temperature=0.0)


def measure(folder: Path, rows: list[list[int]], dtype: str) -> dict[str, Any]:
    config = EngineConfig(dtype=dtype, kernels="native", prefix_cache=False)  # type: ignore[arg-type]
    model = load_model(folder, dtype=LOADED_IN[dtype])
    engine = build_engine(model, config, eos_id=None, threads=torch.get_num_threads())
    for number, row in enumerate(rows):
        request = SequenceRequest(number, row, max_tokens=0, sampling=GREEDY, num_prompt_logprobs=0)
        engine.submit(request)
    logprobs: list[float] = []
    start_s = time.perf_counter()
    while engine.has_work:
        for event in engine.step().events:
            logprobs += [
                token.logprob for token in event.prompt_logprobs or [] if token is not None
            ]
    nats = -sum(logprobs) / len(logprobs)
    seconds = time.perf_counter() - start_s
    say(
        f"{dtype}: {nats:.5f} nats per token, perplexity {math.exp(nats):.4f}, {len(logprobs) / seconds:.0f} tokens/s"
    )
    return {"nats_per_token": round(nats, 6), "perplexity": round(math.exp(nats), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.checkpoint)
    assert tokenizer is not None, "a text needs a tokenizer.json"
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.max_tokens]
    length = load_model(arguments.checkpoint).config.n_positions
    rows = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    figures = {dtype: measure(arguments.checkpoint, rows, dtype) for dtype in LOADED_IN}
    exact = figures["float32"]["perplexity"]
    costs = {
        f"{name}_over_float32": round(figures[name]["perplexity"] / exact, 5)
        for name in ("bfloat16", "int8")
    }
    print(json.dumps(figures | costs | {"num_tokens": len(ids)}))


if __name__ == "__main__":
    main()
