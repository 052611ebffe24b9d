"""Serving in numbers: raymill's endpoint beside vLLM's CPU build and `transformers.generate`.

    python -m tests.benchmarks.bench_serve [--preset gpt2-124m] [--rounds 3] [--requests 64] [--mixed]

GPT-2's 124M shape, or another preset's, with random weights, two threads, prompts of 128 random
tokens, 64 greedy new tokens, 1 and 16 streams, each of which sends its next request when its last
one has ended. All compute in bf16 where this processor does so at speed, and else in fp32; one more
endpoint of raymill's computes in int8, its fastest precision, which vLLM has for quantized
checkpoints only. Servers stream over HTTP to one client. Contenders take turns, and all but one
stand still; a ratio is the median of its rounds' ratios, and above 1 it says that raymill is the
faster one. `int8_vllm_ratio` compares the fastest of each, `ttft_p99_ratio` and `itl_p99_ratio` the
99th percentiles of the time to the first token and of that between tokens. `http_over_engine` is
the endpoint's speed in that of its engine alone; `bandwidth_fraction` the rate at which one
stream's tokens read the weights, of that at which this machine reads memory. Prints a table as it
goes and, last, one JSON object. A contender that is missing or fails ends it with exit code 1.

Requests of one size run in step: all end, and the next ones are read, at the same time. With
`--mixed` 16 streams send prompts of 32 to 512 tokens and ask for 16 to 128, as users would; vLLM,
the endpoint and its engine answer those.

All are held to AVX2 by RAYMILL_KERNELS_MARCH=x86-64-v3 ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from model.config import PRESETS, GPTConfig
from model.files.checkpoint_folder import Metadata
from model.gpt import GPT
from model.hardware.processor import fast_precision
from model.kernels.native_library import MARCH_VARIABLE
from model.text.tokenizer import Tokenizer, from_gpt2_files, train_bpe
from raymill.files.safetensors_file import parameter_hash
from tests.benchmarks.http_load import (
    MIXED_PROMPT_TOKENS,
    MODEL,
    NEW_TOKENS,
    PROMPT_TOKENS,
    BenchError,
    Load,
    mixed_new_tokens,
)
from tests.benchmarks.serve_contenders import Contender, LineContender, Raymill, vllm_on_cpu
from tests.checkpoints import save_model
from tests.repository import REPOSITORY

# Always the same one: vLLM keeps what it compiled by the model's path
FOLDER = REPOSITORY / ".benchmarks" / "serve"
STREAMS = (16, 1)
CONFIG = GPTConfig(**PRESETS["gpt2-124m"])
N_POSITIONS = 1024
RAY_ROLES = {"proxy": "ray::ProxyActor", "replica": "ray::ServeReplica"}

Rounds = dict[tuple[str, int], list[Load]]  # by contender and number of streams


def every_id_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with a text for each of the model's ids, which vLLM needs: bytes, two
    letters, then four."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    bytes_only = json.loads(train_bpe([], vocab_size=257).to_json())["model"]["vocab"]
    pairs = [(a, b) for a in letters for b in letters]
    words = ["".join(pair) for pair in pairs]
    merges = [*pairs, *((a, b) for a in words for b in words)][: vocab_size - 257]
    texts = [
        *sorted((t for t in bytes_only if len(t) == 1), key=bytes_only.__getitem__),
        *map("".join, merges),
    ]
    vocab, merge_lines = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({text: number for number, text in enumerate(texts)}))
    merge_lines.write_text("\n".join(" ".join(pair) for pair in merges))
    return from_gpt2_files(vocab, merge_lines)


def write_model(folder: Path, config: GPTConfig = CONFIG) -> Path:
    """Writes a checkpoint folder of raymill's, which vLLM and transformers read as it is."""
    model = GPT(config)
    model.init_weights(1)
    metadata = Metadata(
        run_id=MODEL,
        step=0,
        tokens_seen=0,
        data_manifest_hash=None,
        code_version="benchmark",
        parameter_hash=parameter_hash(model.state_dict()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    tokenizer = every_id_tokenizer(folder, vocab_size=config.vocab_size)
    save_model(
        checkpoint,
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
    )
    return checkpoint


def random_prompts(
    count: int, *, seed: str, vocab_size: int = CONFIG.vocab_size
) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab_size - 1) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def mixed_prompts(count: int, *, seed: str, vocab_size: int) -> list[list[int]]:
    """Returns prompts whose lengths are drawn evenly on a scale of logarithms."""
    source = random.Random(seed)
    shortest, longest = map(math.log, MIXED_PROMPT_TOKENS)
    lengths = [round(math.exp(source.uniform(shortest, longest))) for _ in range(count)]
    return [[source.randrange(vocab_size - 1) for _ in range(length)] for length in lengths]


def read_bandwidth() -> float:
    """Returns bytes per second, in a process of its own with as many threads as all others have."""
    command = [sys.executable, "-m", "tests.benchmarks.serve_process", "bandwidth", "-", "-"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["bytes_per_s"])


def weight_bytes_per_token(config: GPTConfig, dtype: str) -> int:
    """Returns the bytes that a token reads: one row of each embedding that is only looked up, and
    everything else."""
    looked_up = 0 if config.network.has_rotation else config.n_positions * config.n_embd
    looked_up += 0 if config.tie_word_embeddings else config.vocab_size * config.n_embd
    return getattr(torch, dtype).itemsize * (config.num_parameters - looked_up)


def take_turns(
    contenders: list[Contender], *, num_rounds: int, num_requests: int, vocab_size: int
) -> tuple[Rounds, dict[str, float]]:
    """Prints the loads, and the CPU seconds of the parts of raymill's HTTP path with 16 streams.
    The order of contenders turns round by round."""
    rounds: Rounds = defaultdict(list)
    http_cpu_s: dict[str, float] = defaultdict(float)
    for number in range(num_rounds + 1):  # the first one warms up
        for contender in contenders if number % 2 else reversed(contenders):
            contender.resume()
            for num_streams in STREAMS:
                count = (
                    num_streams
                    if number == 0
                    else requests_of(contender, num_streams, num_requests)
                )
                prompts = random_prompts(
                    count, seed=f"{number} {num_streams}", vocab_size=vocab_size
                )
                before_s = contender.cpu_s()
                load = contender.measure(prompts, num_streams=num_streams)
                if load.num_tokens != NEW_TOKENS * count:
                    raise BenchError(
                        f"{contender.name} gave {load.num_tokens} tokens for {count} requests"
                    )
                if number == 0:
                    continue
                rounds[contender.name, num_streams].append(load)
                if contender.name == "raymill" and num_streams == STREAMS[0]:
                    for part, name in RAY_ROLES.items():
                        spent = {
                            k: s - before_s.get(k, 0.0)
                            for k, s in contender.cpu_s().items()
                            if name in k
                        }
                        http_cpu_s[part] += sum(spent.values())
                print(row(f"{number}  {contender.name}", num_streams, [load]), flush=True)
            contender.pause()
    return rounds, http_cpu_s


def take_mixed_turns(
    contenders: list[Contender], *, num_rounds: int, num_requests: int, vocab_size: int
) -> Rounds:
    """Prints the loads of mixed requests. The order of contenders turns round by round."""
    rounds: Rounds = defaultdict(list)
    num_streams = STREAMS[0]
    for number in range(num_rounds + 1):  # the first one warms up
        prompts = mixed_prompts(num_requests, seed=f"mixed {number}", vocab_size=vocab_size)
        num_tokens = sum(map(mixed_new_tokens, prompts))
        for contender in contenders if number % 2 else reversed(contenders):
            contender.resume()
            load = contender.measure(prompts, num_streams=num_streams, is_mixed=True)
            contender.pause()
            if load.num_tokens != num_tokens:
                raise BenchError(f"{contender.name} gave {load.num_tokens} of {num_tokens} tokens")
            if number > 0:
                rounds[contender.name, num_streams].append(load)
                print(row(f"{number}  {contender.name}", num_streams, [load]), flush=True)
    return rounds


def requests_of(contender: Contender, num_streams: int, num_requests: int) -> int:
    """Rounds down to whole batches; transformers is slow, and its batches differ little."""
    if contender.name == "transformers":
        num_requests //= 2
    return (
        max(num_requests // 16 * num_streams, 1) if num_streams > 1 else max(num_requests // 10, 1)
    )


def percentiles_ms(seconds: list[float]) -> tuple[float, float]:
    """Returns the median and the 99th percentile."""
    cuts = statistics.quantiles(
        seconds if len(seconds) > 1 else seconds * 2, n=100, method="inclusive"
    )
    return round(1000 * cuts[49], 2), round(1000 * cuts[98], 2)


def row(name: str, num_streams: int, loads: list[Load]) -> str:
    rates = [load.tokens_per_s for load in loads]
    text = f"{name:16} {num_streams:2} streams {statistics.median(rates):7.1f} tokens/s"
    if len(rates) > 1:
        text += f"  spread {(max(rates) - min(rates)) / statistics.median(rates):4.0%}"
    for label, seconds in latencies(loads).items():
        text += f"  {label} p50 {percentiles_ms(seconds)[0]:7.1f} p99 {percentiles_ms(seconds)[1]:7.1f} ms"
    return text


def latencies(loads: list[Load]) -> dict[str, list[float]]:
    """Returns None where there is no stream to watch."""
    ttft_s, itl_s = (
        [s for load in loads for s in getattr(load, name)] for name in ("ttft_s", "itl_s")
    )
    return {"ttft": ttft_s, "itl": itl_s} if ttft_s else {}


def figures(
    rounds: Rounds, http_cpu_s: dict[str, float], bandwidth: float, *, bytes_per_token: int
) -> dict[str, float]:
    def ratio(
        peer: str, num_streams: int, of: Callable[[Load], float], ours: str = "raymill"
    ) -> float:
        pairs = zip(rounds[ours, num_streams], rounds[peer, num_streams], strict=True)
        return round(
            statistics.median(of(our_load) / of(their_load) for our_load, their_load in pairs), 3
        )

    def rate(load: Load) -> float:
        return load.tokens_per_s

    many, one = STREAMS
    result = {
        "vllm_ratio_1": ratio("vllm", one, rate),
        "vllm_ratio_16": ratio("vllm", many, rate),
        "int8_vllm_ratio_1": ratio("vllm", one, rate, "raymill-int8"),
        "int8_vllm_ratio_16": ratio("vllm", many, rate, "raymill-int8"),
        "http_over_engine": ratio("engine", many, rate),
        "http_over_engine_1": ratio("engine", one, rate),
        "ttft_ratio_16": ratio("vllm", many, lambda load: 1 / statistics.median(load.ttft_s)),
        "ttft_ratio_1": ratio("vllm", one, lambda load: 1 / statistics.median(load.ttft_s)),
        "ttft_p99_ratio_16": ratio("vllm", many, lambda load: 1 / percentiles_ms(load.ttft_s)[1]),
        "ttft_p99_ratio_1": ratio("vllm", one, lambda load: 1 / percentiles_ms(load.ttft_s)[1]),
        "itl_p99_ratio_16": ratio("vllm", many, lambda load: 1 / percentiles_ms(load.itl_s)[1]),
        "itl_p99_ratio_1": ratio("vllm", one, lambda load: 1 / percentiles_ms(load.itl_s)[1]),
        "transformers_ratio_1": ratio("transformers", one, rate),
        "transformers_ratio_16": ratio("transformers", many, rate),
        "memory_gb_per_s": round(bandwidth / 1e9, 2),
    }
    for (name, num_streams), loads in rounds.items():
        label = f"{name}_{num_streams}"
        result[f"{label}_tokens_per_s"] = round(
            statistics.median(load.tokens_per_s for load in loads), 1
        )
        for kind, seconds in latencies(loads).items():
            result[f"{label}_{kind}_p50_ms"], result[f"{label}_{kind}_p99_ms"] = percentiles_ms(
                seconds
            )
    read = bytes_per_token * result["raymill_1_tokens_per_s"]
    num_tokens = sum(load.num_tokens for load in rounds["raymill", many])
    cpu_ms = {
        f"{part}_cpu_ms_per_token": round(1000 * s / num_tokens, 3)
        for part, s in http_cpu_s.items()
    }
    return {"bandwidth_fraction": round(read / bandwidth, 3)} | result | cpu_ms


def mixed_figures(rounds: Rounds) -> dict[str, float]:
    """Returns medians of the rounds' ratios: above 1 raymill is the better one."""
    ours, theirs, engine = (rounds[name, STREAMS[0]] for name in ("raymill", "vllm", "engine"))
    result = {
        "mixed_vllm_ratio": _median_ratio(ours, theirs, lambda load: load.tokens_per_s),
        "mixed_http_over_engine": _median_ratio(ours, engine, lambda load: load.tokens_per_s),
    }
    for place, percentile in enumerate(("p50", "p99")):
        result[f"mixed_ttft_{percentile}_ratio"] = _median_ratio(
            ours, theirs, lambda load, place=place: 1 / percentiles_ms(load.ttft_s)[place]
        )
        result[f"mixed_itl_{percentile}_ratio"] = _median_ratio(
            ours, theirs, lambda load, place=place: 1 / percentiles_ms(load.itl_s)[place]
        )
    return result


def _median_ratio(ours: list[Load], theirs: list[Load], of: Callable[[Load], float]) -> float:
    ratios = [of(our) / of(their) for our, their in zip(ours, theirs, strict=True)]
    return round(statistics.median(ratios), 3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-124m", choices=PRESETS, help="the model's shape")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one to warm up")
    parser.add_argument(
        "--requests", type=int, default=64, help="of a round with 16 streams; a tenth with one"
    )
    parser.add_argument("--mixed", action="store_true", help="requests of many sizes instead")
    arguments = parser.parse_args()
    try:
        result = compare(
            arguments.preset,
            num_rounds=arguments.rounds,
            num_requests=arguments.requests,
            is_mixed=arguments.mixed,
        )
    except BenchError as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def compare(preset: str, *, num_rounds: int, num_requests: int, is_mixed: bool) -> dict[str, float]:
    config = GPTConfig(**PRESETS[preset] | {"n_positions": N_POSITIONS})
    dtype = "bfloat16" if fast_precision("cpu") == "bf16" else "float32"
    held_to = os.environ.get(MARCH_VARIABLE)
    print(
        f"{preset}, all in {dtype}, {'which' if dtype == 'bfloat16' else 'as bf16 is not what'} this processor computes at speed",
        end="",
    )
    print(f"; raymill's kernels are held to {held_to}" if held_to else "")
    print(
        f"writing a checkpoint, measuring the memory, starting the contenders; logs: {FOLDER}",
        flush=True,
    )
    checkpoint = write_model(FOLDER / preset, config)
    bandwidth = read_bandwidth()
    with contextlib.ExitStack() as running:
        contenders: list[Contender] = [
            vllm_on_cpu(checkpoint, dtype=dtype, log=FOLDER / "vllm.log"),
            LineContender("engine", checkpoint, dtype=dtype, log=FOLDER / "engine.log"),
            Raymill("raymill", checkpoint, dtype=dtype, log=FOLDER / "raymill.log"),
        ]
        if not is_mixed:
            log = FOLDER / "transformers.log"
            contenders += [
                LineContender("transformers", checkpoint, dtype=dtype, log=log),
                Raymill("raymill-int8", checkpoint, dtype="int8", log=FOLDER / "raymill-int8.log"),
            ]
        for contender in contenders:
            running.enter_context(contender)
            contender.pause()
        if is_mixed:
            rounds = take_mixed_turns(
                contenders,
                num_rounds=num_rounds,
                num_requests=num_requests,
                vocab_size=config.vocab_size,
            )
            for (name, num_streams), loads in rounds.items():
                print(row(name, num_streams, loads))
            return mixed_figures(rounds)
        rounds, http_cpu_s = take_turns(
            contenders,
            num_rounds=num_rounds,
            num_requests=num_requests,
            vocab_size=config.vocab_size,
        )
    bandwidth = max(bandwidth, read_bandwidth())
    print(f"\nmedians, all in {dtype} but raymill-int8")
    for (name, num_streams), loads in rounds.items():
        print(row(name, num_streams, loads))
    return figures(
        rounds, http_cpu_s, bandwidth, bytes_per_token=weight_bytes_per_token(config, dtype)
    )


if __name__ == "__main__":
    sys.exit(main())
