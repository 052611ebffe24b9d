"""MB per CPU-second of the tokenize stage, beside tiktoken's bare loop and `datasets.map`, and its
memory as input grows.

The bare loop is tiktoken as it comes, with its own GPT-2 pattern; `tuned_loop` has the stage's
faster pattern. All encode the same documents with the same tokenizer.json and must give the same
ids. They take turns, so that a change of the machine's speed meets all. The stage counts whole:
listing, reading, deduplication, encoding, writing, and Ray's own processes, which take about 6
CPU-seconds however small the corpus is. Prints a table and, last, one JSON object.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import tiktoken
from rich.console import Console
from rich.table import Table
from tiktoken_ext.openai_public import r50k_pat_str

from cluster.commands.demo_run import fetch_corpus
from cluster.output.progress import say
from cluster.settings.run import RunConfig
from cluster.storage.uris import split_uri
from jobs.tokens.token_store import read_manifest, token_dtype
from model.text.bulk_encoder import BulkEncoder
from model.text.tokenizer import Tokenizer, train_bpe
from tests.benchmarks.process_meter import ProcessMeter
from tests.benchmarks.salted_corpus import documents, write_corpus
from tests.repository import REPOSITORY

VOCAB_SIZE = 32_768

Ids = npt.NDArray[Any]


def multiset_hash(id_lists: Iterable[Ids]) -> str:
    """Returns the same for the same documents' ids in any order, as the stage separates training
    and validation."""
    hashes = sorted(
        hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).digest() for ids in id_lists
    )
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def stock_encoding(encoder: BulkEncoder) -> tiktoken.Encoding:
    """Returns the vocabulary as a user of tiktoken would load it: with GPT-2's pattern as tiktoken
    writes it."""
    ranks = encoder.encoding._mergeable_ranks
    return tiktoken.Encoding(
        "stock",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


def bare_loop_s(encoding: tiktoken.Encoding, texts: list[str]) -> float:
    encode = encoding.encode_to_numpy
    start = time.process_time()
    for text in texts:
        encode(text, disallowed_special=())
    return time.process_time() - start


def datasets_map_s(
    tokenizer: Tokenizer, dataset: datasets.Dataset
) -> tuple[float, datasets.Dataset]:
    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in encodings]}

    start = time.process_time()
    encoded = dataset.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return time.process_time() - start, encoded


def run_stage(
    corpus: Path,
    tokenizer: Path,
    storage: Path,
    *,
    workers: int,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], ProcessMeter, float]:
    """Returns the stage's result, the resources of its processes, and wall seconds; `settings` are
    more of `data`."""
    data = {"source": str(corpus), "tokenizer": str(tokenizer)} | dict(settings or {})
    config = RunConfig.model_validate({"data": data, "storage": {"uri": str(storage)}})
    storage.mkdir(parents=True)
    config_file = storage / "config.json"
    config_file.write_text(config.model_dump_json(), encoding="utf-8")
    return metered(["tests.benchmarks.tokenize_stage", str(config_file), str(workers)])


def metered(arguments: list[str]) -> tuple[dict[str, Any], ProcessMeter, float]:
    """Runs a module that says it is ready, works once it gets a line, and answers with a line of
    JSON."""
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            if line == "ready\n":
                break
        start = time.monotonic()
        with ProcessMeter(process.pid) as meter:
            print("go", file=process.stdin, flush=True)
            answer = process.stdout.readline()
        wall_s = time.monotonic() - start
    if process.returncode or not answer:
        sys.exit(f"{arguments[0]} failed; see it with: {' '.join(command)}")
    return json.loads(answer), meter, wall_s


def stored_ids(manifest_uri: str) -> Iterator[Ids]:
    """Yields each document of the store, without its end-of-text token."""
    store, _ = split_uri(manifest_uri)
    manifest = read_manifest(store)
    for shard in manifest.shards:
        ids = np.frombuffer(store.read_bytes(shard.file), dtype=token_dtype(manifest.vocab_size))
        if hashlib.sha256(ids.tobytes()).hexdigest() != shard.sha256:
            sys.exit(f"{shard.file} is not what the manifest says")
        ends = np.flatnonzero(ids == manifest.eot_id)
        yield from (part[:-1] for part in np.split(ids, ends + 1)[:-1])


def throughput(folder: Path, texts: Path, *, num_bytes: int, repeats: int) -> dict[str, Any]:
    """Returns CPU seconds of each in each round, after all gave the same ids."""
    tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_bytes())
    corpus = folder / "corpus"
    count = write_corpus(corpus, texts, num_bytes)
    in_memory = list(documents(texts, num_bytes))
    num_bytes = sum(len(text.encode()) for text in in_memory)
    encoder = BulkEncoder(tokenizer)
    expected = multiset_hash(map(encoder.encode, in_memory))
    dataset = datasets.Dataset.from_dict({"text": in_memory})
    seconds: dict[str, list[float]] = {
        "bare_loop": [],
        "tuned_loop": [],
        "datasets_map": [],
        "stage": [],
    }
    stock = stock_encoding(encoder)
    if multiset_hash(stock.encode_to_numpy(text) for text in in_memory) != expected:
        sys.exit("tiktoken's own pattern gives other ids than the tokenizer")
    parts: dict[str, float] = {}
    walls_s: list[float] = []
    for number in range(repeats):
        say(f"round {number + 1} of {repeats}: {num_bytes / 1e6:.0f} MB, {count} documents")
        seconds["bare_loop"].append(bare_loop_s(stock, in_memory))
        seconds["tuned_loop"].append(bare_loop_s(encoder.encoding, in_memory))
        map_s, encoded = datasets_map_s(tokenizer, dataset)
        seconds["datasets_map"].append(map_s)
        # One worker, as one loop: two threads of a core at once take more CPU seconds for the same
        # work.
        stage = {
            "corpus": corpus,
            "tokenizer": folder / "tokenizer.json",
            "storage": folder / f"storage-{number}",
        }
        result, meter, wall_s = run_stage(**stage, workers=1)
        seconds["stage"].append(meter.cpu_s())
        walls_s.append(wall_s)
        parts = {role: round(meter.cpu_s(role), 2) for role in ("driver", "worker", "ray")}
        if (result["documents"], result["bytes"]) != (count, num_bytes):
            sys.exit(
                f"the stage kept {result['documents']} of {count} documents; dropped: {result['dropped']}"
            )
        if number == 0:
            rows = (row["ids"] for row in encoded.with_format("numpy"))
            for name, ids in (
                ("datasets.map", rows),
                ("the stage", stored_ids(result["manifest"])),
            ):
                if multiset_hash(ids) != expected:
                    sys.exit(f"{name} gave other ids than tiktoken's bare loop")
    return {
        "mb": num_bytes / 1e6,
        "cpu_s": seconds,
        "stage_cpu_s_by_role": parts,
        "stage_wall_s": walls_s,
    }


def peak_memory(folder: Path, texts: Path, *, num_bytes: int) -> dict[str, list[float]]:
    """Returns peaks in MB of the driver and of each worker, the largest first, while the stage
    reads that much text."""
    say(f"memory at {num_bytes / 1e6:.0f} MB")
    count = write_corpus(folder / "corpus", texts, num_bytes)
    stage = {
        "corpus": folder / "corpus",
        "tokenizer": folder.parent / "tokenizer.json",
        "storage": folder / "storage",
    }
    result, meter, _ = run_stage(**stage, workers=os.cpu_count() or 1)
    if result["documents"] != count:
        sys.exit(
            f"the stage kept {result['documents']} of {count} documents; dropped: {result['dropped']}"
        )
    return {
        role: [round(peak, 1) for peak in meter.peaks_mb(role)] for role in ("driver", "worker")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=600, help="text of the throughput rounds, MB"
    )
    parser.add_argument(
        "--rss-megabytes", type=int, default=1000, help="text of the memory run, MB; 0 skips it"
    )
    parser.add_argument("--repeats", type=int, default=3, help="throughput rounds")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory(
        prefix="raymill-bench-", ignore_cleanup_errors=True
    ) as scratch:
        folder = Path(scratch)
        texts, source = fetch_corpus(REPOSITORY / ".raymill" / "corpus")
        say(f"corpus: {source}, repeated with other words in each document")
        trained = train_bpe(
            (path.read_text(encoding="utf-8") for path in sorted(texts.iterdir())),
            vocab_size=VOCAB_SIZE,
        )
        (folder / "tokenizer.json").write_bytes(trained.to_json())
        result = throughput(
            folder, texts, num_bytes=arguments.megabytes * 10**6, repeats=arguments.repeats
        )
        memory = {
            megabytes: peak_memory(
                folder / f"memory-{megabytes}", texts, num_bytes=megabytes * 10**6
            )
            for megabytes in (arguments.rss_megabytes // 10, arguments.rss_megabytes)
            if megabytes
        }
    report(result, memory)
    return 0


def report(result: dict[str, Any], memory: dict[int, dict[str, list[float]]]) -> None:
    table = Table("encoder", "MB per CPU-second", "spread", title="English, 32k ids")
    rates = {
        name: [result["mb"] / second for second in seconds]
        for name, seconds in result["cpu_s"].items()
    }
    for name, values in rates.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle:.2f}", f"{(max(values) - min(values)) / middle:.0%}")
    summary: dict[str, Any] = {
        f"{'encoder' if peer == 'bare_loop' else peer}_ratio": round(
            statistics.median(
                ours / theirs for ours, theirs in zip(rates["stage"], rates[peer], strict=True)
            ),
            3,
        )
        for peer in ("bare_loop", "tuned_loop", "datasets_map")
    }
    summary["mb_per_cpu_s"] = round(statistics.median(rates["stage"]), 2)
    if memory:
        (_, small), (_, large) = sorted(memory.items())
        summary["peak_rss_mb"] = max(peak for peaks in large.values() for peak in peaks)
        summary["rss_growth"] = round(max(large[role][0] / small[role][0] for role in small), 3)
        for megabytes, peaks in sorted(memory.items()):
            workers = ", ".join(f"{peak:.0f}" for peak in peaks["worker"])
            table.add_row(
                f"peak MB at {megabytes} MB",
                f"driver {peaks['driver'][0]:.0f}",
                f"workers {workers}",
            )
    for name in ("encoder_ratio", "tuned_loop_ratio", "datasets_map_ratio", "rss_growth"):
        if name in summary:
            table.add_row(name, f"{summary[name]:.2f}", "")
    Console().print(table)
    print(json.dumps(summary | {"memory_mb": memory} | result))


if __name__ == "__main__":
    sys.exit(main())
