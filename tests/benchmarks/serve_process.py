"""The processes that `bench_serve` starts beside vLLM: raymill's endpoint, its engine alone,
transformers.

    python -m tests.benchmarks.serve_process endpoint|engine|transformers|bandwidth FOLDER DTYPE [SETTINGS]

A line of JSON says that it is ready. The endpoint, for which SETTINGS are groups of `ServeConfig`
as JSON, lives until its standard input ends. The others then answer each line `{"prompts",
"num_streams", "is_mixed"}` with `{"num_tokens", "wall_s"}`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cluster.settings.serve import EngineConfig
from tests.benchmarks.http_load import MODEL, NEW_TOKENS, BenchError, mixed_new_tokens

NUM_THREADS = 2
NUM_SLOTS = 16
BANDWIDTH_BYTES = 1 << 30
Generate = Callable[[list[list[int]], int, bool], int]


def engine_config(dtype: str) -> EngineConfig:
    """Turns the prefix cache off: rounds repeat their prompts, which vLLM reads again each time
    too."""
    return EngineConfig.model_validate(
        {"max_num_seqs": NUM_SLOTS, "dtype": dtype, "prefix_cache": False}
    )


def serve_endpoint(folder: Path, dtype: str, settings: dict[str, dict[str, Any]]) -> None:
    from cluster.local.local_cluster import free_port
    from cluster.settings.serve import ServeConfig
    from serving.app import run
    from tests.serving.endpoint_parts import ray_cluster

    given = {"checkpoint": str(folder), "model_name": MODEL, "port": free_port()}
    replicas = {"threads_per_replica": NUM_THREADS} | settings.get("replicas", {})
    engine = engine_config(dtype).model_dump(exclude_unset=True) | settings.get("engine", {})
    config = ServeConfig.model_validate(given | settings | {"replicas": replicas, "engine": engine})
    # `bench_http` measures what raymill refuses.
    with (
        mock.patch("serving.app.require_ray_proxies"),
        ray_cluster(num_cpus=config.replicas.threads_per_replica),
    ):
        say(run(config))
        sys.stdin.read()


def engine_alone(folder: Path, dtype: str) -> Generate:
    """Runs the streams of `http_load.closed_loop` without HTTP, Ray and the socket."""
    from model.files.checkpoint import load_model
    from model.generation.sampling_params import SamplingParams
    from serving.engine.messages import SequenceRequest
    from serving.engine.runner import LOADED_IN
    from serving.engine_process.run_engine import build_engine

    model = load_model(folder, dtype=LOADED_IN[dtype])
    engine = build_engine(model, engine_config(dtype), eos_id=None, threads=NUM_THREADS)
    greedy = SamplingParams(temperature=0.0)

    def generate(prompts: list[list[int]], num_streams: int, is_mixed: bool) -> int:
        num_tokens, next_up = 0, iter(enumerate(prompts))

        def submit_next() -> None:
            for number, prompt in next_up:
                new_tokens = mixed_new_tokens(prompt) if is_mixed else NEW_TOKENS
                engine.submit(SequenceRequest(number, prompt, new_tokens, greedy, ignore_eos=True))
                return

        for _ in range(num_streams):
            submit_next()
        while engine.has_work:
            for event in engine.step().events:
                num_tokens += event.token_id is not None
                if event.finish_reason is not None:
                    submit_next()
        return num_tokens

    return generate


def transformers_alone(folder: Path, dtype: str) -> Generate:
    """Runs streams as the rows of a batch; the next batch starts when the last one has ended: there
    is no other way."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], num_streams: int, is_mixed: bool) -> int:
        if is_mixed:
            raise BenchError("its batches take prompts of one length")
        num_tokens = 0
        for start in range(0, len(prompts), num_streams):
            batch = torch.tensor(prompts[start : start + num_streams])
            tokens = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
            num_tokens += tokens[:, batch.shape[1] :].numel()
        return num_tokens

    return generate


def read_bandwidth() -> float:
    """Returns the bytes per second at which this machine reads memory with as many threads: the
    best of several sums."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    buffer.sum()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return BANDWIDTH_BYTES / min(seconds)


def answer_lines(generate: Generate) -> None:
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        num_tokens = generate(request["prompts"], request["num_streams"], request["is_mixed"])
        say({"num_tokens": num_tokens, "wall_s": time.perf_counter() - start})


def say(message: Any) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    role, folder, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(NUM_THREADS)
    match role:
        case "endpoint":
            serve_endpoint(folder, dtype, json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
        case "engine":
            answer_lines(engine_alone(folder, dtype))
        case "transformers":
            answer_lines(transformers_alone(folder, dtype))
        case "bandwidth":
            say({"bytes_per_s": read_bandwidth()})
        case _:
            raise BenchError(f"{role} is nothing to start")
    return 0


if __name__ == "__main__":
    sys.exit(main())
