"""One GPU's endpoint in numbers: raymill's, with vLLM as its engine, beside a bare vLLM server on
the same checkpoint.

    make bench-gpu-serve RAYMILL_VLLM_PYTHON=/path/to/vllm/bin/python
    python -m tests.benchmarks.bench_gpu_serve --vllm-python FILE [--rounds 3] [--seconds 540] [--device cpu --tiny]

Needs raymill's own environment (`make` makes it) with the package aiohttp, and the Python of an
environment with vLLM 0.32; no network. Both servers run on the one card, with less than half of its
memory each, and take turns; the other one stands still. raymill's is the whole of it: Ray Serve's
proxy with the front door, a replica, its engine process. GPT-2's 124M shape with random weights in
bf16, prompts of 128 tokens and 64 greedy new ones, 1 to 256 streams, each of which sends its next
request when its last one has ended. Prints each load, then a table of medians and, last, one JSON
object. What there is no time for is left out. A server that is missing or fails ends it with exit
code 1; an aim that is missed does not.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from model.config import PRESETS, GPTConfig
from tests.benchmarks.bench_serve import Rounds, percentiles_ms, random_prompts, row, write_model
from tests.benchmarks.http_load import NEW_TOKENS, PROMPT_TOKENS, BenchError
from tests.benchmarks.serve_contenders import VLLM_PYTHON, HttpContender, Raymill, Vllm
from tests.repository import REPOSITORY

FOLDER = REPOSITORY / ".benchmarks" / "gpu-serve"
STREAMS, TINY_STREAMS = (1, 4, 16, 64, 256), (1, 4)
TINY = GPTConfig(vocab_size=1024, n_positions=256, n_layer=2, n_head=2, n_embd=128)
MEMORY_SHARE = 0.4  # of the card, for each of two servers
AIM_RATIO, AIM_TTFT_MS = 0.9, 5.0


def contenders(
    checkpoint: Path, config: GPTConfig, *, device: str, vllm_python: Path
) -> list[HttpContender]:
    """Returns both servers, with the same settings of vLLM's."""
    on_gpu = device == "cuda"
    dtype, most = ("bfloat16", max(STREAMS)) if on_gpu else ("float32", max(TINY_STREAMS))
    # Compiling the tiny form would take longer than all the rest.
    shared: dict[str, Any] = (
        {"gpu_memory_utilization": MEMORY_SHARE} if on_gpu else {"enforce_eager": True}
    )
    engine = {
        "backend": "vllm",
        "vllm_python": str(vllm_python),
        "device": device,
        "max_num_seqs": most,
    }
    settings = {
        "engine": engine | {"vllm_args": shared},
        "replicas": {"max_ongoing_requests": most, "threads_per_replica": 1},
    }
    bare = {name.replace("_", "-"): value for name, value in shared.items()}
    bare |= {"max-model-len": config.n_positions, "max-num-seqs": most}
    # One thread, as the replica has: two on a busy core would wait for each other.
    bind = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment = {} if on_gpu else bind
    return [
        Raymill("raymill", checkpoint, dtype=dtype, log=FOLDER / "raymill.log", settings=settings),
        Vllm(
            checkpoint,
            dtype=dtype,
            log=FOLDER / "vllm.log",
            settings=bare,
            environment=environment,
            python=vllm_python,
        ),
    ]


def take_turns(
    servers: list[HttpContender],
    config: GPTConfig,
    *,
    streams: tuple[int, ...],
    num_rounds: int,
    deadline: float,
) -> Rounds:
    """Prints the loads. Raises `BenchError` if the time is over before there is a whole round."""
    rounds: Rounds = defaultdict(list)
    # The first one warms up, which compiles and captures graphs
    for number in range(num_rounds + 1):
        start_s, found = time.monotonic(), []
        for server in servers if number % 2 else reversed(servers):
            server.resume()
            for num_streams in streams:
                count = max(8, (4 if number else 1) * num_streams)
                prompts = random_prompts(
                    count, seed=f"{number} {num_streams}", vocab_size=config.vocab_size
                )
                load = server.measure(prompts, num_streams=num_streams)
                print(row(f"{number or 'warm'}  {server.name}", num_streams, [load]), flush=True)
                found += [(server.name, num_streams, load)] if number else []
            server.pause()
        for name, num_streams, load in found:
            rounds[name, num_streams].append(load)
        if time.monotonic() + 1.2 * (time.monotonic() - start_s) > deadline:
            break
    if not rounds:
        raise BenchError("the time was over before a round could begin; give more --seconds")
    return rounds


def figures(rounds: Rounds, num_streams: int) -> dict[str, Any]:
    """Returns medians over the rounds; the ratio is the median of the rounds' ratios."""
    ours, theirs = rounds["raymill", num_streams], rounds["vllm", num_streams]
    ratios = [
        our.tokens_per_s / their.tokens_per_s for our, their in zip(ours, theirs, strict=True)
    ]
    result: dict[str, Any] = {"streams": num_streams, "ratio": round(statistics.median(ratios), 3)}
    for name, loads in (("raymill", ours), ("vllm", theirs)):
        result[f"{name}_tokens_per_s"] = round(
            statistics.median(load.tokens_per_s for load in loads), 1
        )
        for kind in ("ttft", "itl"):
            seconds = [s for load in loads for s in getattr(load, f"{kind}_s")]
            result[f"{name}_{kind}_p50_ms"], result[f"{name}_{kind}_p99_ms"] = percentiles_ms(
                seconds
            )
    result["ttft_gap_ms"] = round(result["raymill_ttft_p50_ms"] - result["vllm_ttft_p50_ms"], 2)
    result["aims_met"] = result["ratio"] >= AIM_RATIO and result["ttft_gap_ms"] <= AIM_TTFT_MS
    return result


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "streams  tokens/s: raymill     vLLM  ratio   first token ms: raymill   vLLM   token ms: raymill   vLLM"
    ]
    for r in rows:
        lines.append(
            f"{r['streams']:7}  {r['raymill_tokens_per_s']:17,.0f} {r['vllm_tokens_per_s']:8,.0f} {r['ratio']:6.2f}  "
            f"{r['raymill_ttft_p50_ms']:24.1f} {r['vllm_ttft_p50_ms']:6.1f}  {r['raymill_itl_p50_ms']:18.2f} "
            f"{r['vllm_itl_p50_ms']:6.2f}  {'ok' if r['aims_met'] else 'missed'}"
        )
    lines.append(
        f"aim: at least {AIM_RATIO} of vLLM's tokens/s, the first token at most {AIM_TTFT_MS:g} ms later"
    )
    return "\n".join(lines)


def machine(device: str, vllm_python: Path) -> dict[str, str]:
    """Returns the card, its driver and vLLM's version."""
    query = [str(vllm_python), "-c", "import vllm; print(vllm.__version__)"]
    version = subprocess.run(
        query, capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()[-1]
    if device == "cpu":
        return {"card": "none", "driver": "none", "vllm": version}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    card, driver = subprocess.run(
        query, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split(",")
    return {"card": card.strip(), "driver": driver.strip(), "vllm": version}


def compare(
    *, device: str, tiny: bool, num_rounds: int, seconds: float, vllm_python: Path
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    config = TINY if tiny else GPTConfig(**PRESETS["gpt2-124m"])
    if not vllm_python.exists():
        raise BenchError(
            f"{vllm_python} is missing: name the Python of an environment with vLLM 0.32 (--vllm-python)"
        )
    where = machine(device, vllm_python)
    print(
        f"{where['card']}, vLLM {where['vllm']}; starting both servers; logs: {FOLDER}", flush=True
    )
    checkpoint = write_model(FOLDER, config)
    with contextlib.ExitStack() as running:
        servers = []
        for server in contenders(checkpoint, config, device=device, vllm_python=vllm_python):
            servers.append(running.enter_context(server))
            server.pause()
        streams = TINY_STREAMS if device == "cpu" else STREAMS
        rounds = take_turns(
            servers, config, streams=streams, num_rounds=num_rounds, deadline=deadline
        )
    rows = [figures(rounds, num_streams) for num_streams in streams]
    num_found = len(rounds["raymill", streams[0]])
    print(
        f"\nmedians of {num_found} rounds, {PROMPT_TOKENS} tokens in and {NEW_TOKENS} out\n{table(rows)}"
    )
    return {"machine": where, "rounds": num_found, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one to warm up")
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="no round begins that would end later"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model: tries the benchmark itself"
    )
    parser.add_argument(
        "--vllm-python", type=Path, default=Path(os.environ.get("RAYMILL_VLLM_PYTHON", VLLM_PYTHON))
    )
    arguments = parser.parse_args()
    try:
        result = compare(
            device=arguments.device,
            tiny=arguments.tiny,
            num_rounds=arguments.rounds,
            seconds=arguments.seconds,
            vllm_python=arguments.vllm_python,
        )
    except (BenchError, subprocess.SubprocessError, OSError) as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
