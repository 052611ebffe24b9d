"""MB per CPU-second of the tokenize stage with `data.near_dedup_threshold`, beside tiktoken's bare
loop and datatrove.

    python -m tests.benchmarks.bench_near_duplicates [--megabytes 300] [--repeats 3]

The documents are English words in an order of their own, so that none resembles another, but for
one in a hundred: that is an earlier one with another last word. The stage lists, reads, hashes,
compares, encodes and writes, and counts with all of Ray's processes; the bare loop encodes the
documents that the stage keeps; datatrove's MinHash pipeline compares and copies, and encodes
nothing. They take turns. Prints a table and, last, one JSON object; a stage that keeps another
number of documents than were made ends it with exit code 1.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.commands.demo_run import fetch_corpus
from cluster.output.progress import say
from model.text.bulk_encoder import BulkEncoder
from model.text.tokenizer import Tokenizer, train_bpe
from tests.benchmarks.bench_data import VOCAB_SIZE, bare_loop_s, metered, run_stage, stock_encoding
from tests.benchmarks.salted_corpus import documents, write_documents
from tests.repository import REPOSITORY

THRESHOLD = 0.7  # datatrove's 14 buckets of 8 hashes find half of the pairs at 0.72
COPY_EVERY = 100
COPIED_BEFORE = 50  # documents


def shuffled_documents(texts: Path, num_bytes: int) -> Iterator[str]:
    """Yields documents of shuffled words, each hundredth a near-duplicate of one before it."""
    rng, recent = random.Random(1), list[str]()
    for number, text in enumerate(documents(texts, num_bytes)):
        words = text.split()
        rng.shuffle(words)
        recent = [*recent[-COPIED_BEFORE:], " ".join(words)]
        yield f"{recent[0]} {words[0]}" if is_copy(number) else recent[-1]


def is_copy(number: int) -> bool:
    return number % COPY_EVERY == COPY_EVERY - 1


def compare(folder: Path, texts: Path, *, num_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Returns CPU seconds of each in each round."""
    corpus, made = folder / "corpus", list(shuffled_documents(texts, num_bytes))
    write_documents(corpus, made)
    kept = [text for number, text in enumerate(made) if not is_copy(number)]
    encoding = stock_encoding(
        BulkEncoder(Tokenizer.from_json((folder / "tokenizer.json").read_bytes()))
    )
    seconds: dict[str, list[float]] = {"bare_loop": [], "stage": [], "datatrove": []}
    for number in range(repeats):
        say(f"round {number + 1} of {repeats}: {num_bytes / 1e6:.0f} MB, {len(made)} documents")
        seconds["bare_loop"].append(bare_loop_s(encoding, kept))
        settings = {"near_dedup_threshold": THRESHOLD}
        storage = folder / f"storage-{number}"
        result, meter, _ = run_stage(
            corpus, folder / "tokenizer.json", storage, workers=1, settings=settings
        )
        seconds["stage"].append(meter.cpu_s())
        if result["documents"] != len(kept):
            sys.exit(
                f"the stage kept {result['documents']} of {len(kept)} documents; dropped: {result['dropped']}"
            )
        answer, meter, _ = metered(
            ["tests.benchmarks.minhash_peer", str(corpus), str(folder / f"peer-{number}")]
        )
        seconds["datatrove"].append(meter.cpu_s())
        say(f"datatrove kept {answer['documents']} of {len(kept)}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300, help="text of a round, MB")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="raymill-bench-", ignore_cleanup_errors=True
    ) as scratch:
        folder = Path(scratch)
        texts, source = fetch_corpus(REPOSITORY / ".raymill" / "corpus")
        say(f"corpus: the words of {source}")
        trained = train_bpe(
            (path.read_text(encoding="utf-8") for path in texts.iterdir()), vocab_size=VOCAB_SIZE
        )
        (folder / "tokenizer.json").write_bytes(trained.to_json())
        num_bytes = arguments.megabytes * 10**6
        seconds = compare(folder, texts, num_bytes=num_bytes, repeats=arguments.repeats)
    table = Table("with near-duplicates", "MB per CPU-second", "spread")
    for name, of in seconds.items():
        rates = [arguments.megabytes / each for each in of]
        table.add_row(
            name,
            f"{statistics.median(rates):.2f}",
            f"{(max(rates) - min(rates)) / statistics.median(rates):.0%}",
        )
    Console().print(table)
    ratios = {
        f"{peer}_ratio": round(
            statistics.median(b / a for a, b in zip(seconds["stage"], seconds[peer], strict=True)),
            3,
        )
        for peer in ("bare_loop", "datatrove")
    }
    print(json.dumps(ratios | {"cpu_s": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
