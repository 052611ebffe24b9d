"""Time, disk and memory of a corpus as it is listed, previewed, tokenized and packed, beside what
the preview predicts.

The corpus is so many text files of about a kilobyte in one folder, or with `--megabytes` as much
text in one file of jsonl. Last, eleven million files are listed, of a stand-in storage that yields
them as a folder would. Each step runs in a process of its own. Prints a line of JSON for each.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.settings.run import RunConfig
from cluster.storage.folder import LocalStorage
from cluster.storage.uris import Entry
from jobs.corpus.listing import CorpusError, list_corpus
from jobs.corpus.pack_texts import pack
from jobs.tokens.preview_data import preview
from tests.benchmarks.process_meter import ProcessMeter
from tests.repository import REPOSITORY

_TOO_MANY = 11_000_000


def make_texts(folder: Path, *, num_files: int, megabytes: int) -> None:
    """Writes documents of made-up words: as many files, or lines of one file."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiourstlnm", k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(80, 200))) for _ in range(5000)]
    folder.mkdir()
    if megabytes:
        with (folder / "a.jsonl").open("w") as file:
            while file.tell() < megabytes << 20:
                file.write(
                    json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(80, 900)))})
                    + "\n"
                )
        return
    for number in range(num_files):
        (folder / f"{number:08d}.txt").write_text(f"{number} {texts[number % len(texts)]}")


def configured(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": str(folder / "texts"), "vocab_size": 4096},
            "storage": {"uri": str(folder / "storage")},
        }
    )


def refuse(folder: Path) -> dict[str, Any]:
    listed = 0

    def entries(self: LocalStorage, prefix: str = "") -> Iterator[Entry]:
        nonlocal listed
        for number in range(_TOO_MANY):
            listed += 1
            yield Entry(f"{number:08d}.txt", 1000, str(10**18 + number))

    LocalStorage.entries = entries  # type: ignore[method-assign]
    try:
        list_corpus(str(folder / "many"))
    except CorpusError as error:
        return {"listed": listed, "refused": str(error)}
    raise AssertionError("eleven million files were taken")


STEPS: dict[str, Callable[[Path], Any]] = {
    "list": lambda folder: {"files": len(list_corpus(str(folder / "texts")).files)},
    "preview": lambda folder: {
        k: v for k, v in preview(configured(folder)).items() if k in ("files", "tokens", "stage")
    },
    "pack": lambda folder: pack(str(folder / "texts"), str(folder / "packed"), DataConfig()),
    "refuse": refuse,
}


def run_step(name: str, folder: Path) -> dict[str, Any]:
    before, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = STEPS[name](folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    times = {
        "wall_s": round(time.monotonic() - start_s, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
    }
    return (
        {"step": name}
        | times
        | {"peak_mb": used.ru_maxrss >> 10, "imports_mb": before >> 10}
        | found
    )


def tokenized(folder: Path, *, num_workers: int) -> dict[str, Any]:
    """Runs the stage on Ray, and reads its processes from outside."""
    config = folder / "config.json"
    config.write_text(configured(folder).model_dump_json())
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.tokenize_stage",
        str(config),
        str(num_workers),
    ]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, **pipes) as job:
        assert job.stdin is not None and job.stdout is not None
        while job.stdout.readline() != "ready\n":
            pass
        with ProcessMeter(job.pid) as meter:
            start_s = time.monotonic()
            job.stdin.write("\n")
            job.stdin.flush()
            result = json.loads(job.stdout.readline())
            wall_s = time.monotonic() - start_s
        job.stdin.write("\n")
        job.stdin.close()
    store = Path(result["manifest"]).parent
    return {
        "step": "tokenize",
        "wall_s": round(wall_s, 1),
        "worker_cpu_s": round(meter.cpu_s("worker"), 1),
        "driver_cpu_s": round(meter.cpu_s("driver"), 1),
        "tokens": result["tokens"],
        "shards": len(result["shards"]),
        "store_bytes": sum(path.stat().st_size for path in store.glob("*.bin")),
        "driver_mb": round(max(meter.peaks_mb("driver"))),
        "worker_mb": round(max(meter.peaks_mb("worker"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", nargs="+", default=[*STEPS, "tokenize"])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_step(arguments.steps[0], arguments.run)))
        return
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as scratch:
        folder = Path(scratch)
        if arguments.steps != ["refuse"]:
            say("writing the corpus")
            make_texts(folder / "texts", num_files=arguments.files, megabytes=arguments.megabytes)
        for step in arguments.steps:
            if step == "tokenize":
                print(json.dumps(tokenized(folder, num_workers=arguments.workers)), flush=True)
                continue
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench_many_files",
                "--run",
                scratch,
                "--steps",
                step,
            ]
            done = subprocess.run(
                command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
            )
            print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
