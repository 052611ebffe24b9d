"""Selection on real Ray in many sections and partitions: the same store for 1, 2 and 4 workers, one
of them killed."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.corpora import data_config, make_corpus
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

SETTINGS: dict[str, Any] = {
    "near_dedup_threshold": 0.7,
    "decontaminate_ngram": 5,
    "shard_bytes": 20_000,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also holds changed copies of its documents and quotations from them, far away."""
    folder = make_corpus(tmp_path_factory.mktemp("corpus") / "texts", num_documents=400)
    texts = [
        json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()[:100]
    ]
    copies = [f"changed {text} at its ends" for text in texts]
    quotations = [
        f"{number} says: {' '.join(text.split()[5:15])}, {number}"
        for number, text in enumerate(texts)
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in [*copies, *quotations]]
    (folder / "z.jsonl").write_text("".join(lines))
    return folder


def start(
    corpus: Path, folder: Path, *, num_workers: int, task_bytes: int
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    config = data_config(
        str(corpus), folder / "storage", selection_task_bytes=task_bytes, **SETTINGS
    )
    (folder / "config.json").write_text(config.model_dump_json())
    module = str(REPOSITORY / "tests/jobs/tokenize_once.py")
    return subprocess.Popen(
        [sys.executable, module, str(folder / "config.json"), str(num_workers)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = job.communicate(timeout=limit_s(240))
    assert job.returncode == 0
    return {
        name: value
        for name, value in json.loads(output.splitlines()[-1]).items()
        if name != "manifest"
    }


def kill_a_worker(job: subprocess.Popen[str], folder: Path, *, after: str) -> None:
    """Kills a worker that has a task, once the store holds what `after` names."""
    wait_until(
        lambda: any(folder.glob(f"storage/tokens/*/index/*/{after}")),
        poll_s=0.01,
        why=lambda: "no such step",
    )

    def is_killed() -> bool:
        with suppress(psutil.NoSuchProcess):  # one that ends meanwhile
            for process in psutil.Process(job.pid).children(recursive=True):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Map"):
                    process.kill()
                    return True
        return False

    wait_until(is_killed, poll_s=0.005, why=lambda: "no worker has a task")


@pytest.fixture(scope="module")
def undivided(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker makes of the corpus as one section and one partition."""
    result = finish(
        start(corpus, tmp_path_factory.mktemp("one") / "run", num_workers=1, task_bytes=1 << 30)
    )
    assert all(
        result["dropped"][reason] for reason in ("duplicate", "near_duplicate", "contaminated")
    )
    return result


@pytest.mark.parametrize(
    ("num_workers", "after"),
    [
        pytest.param(1, "", marks=pytest.mark.slow),
        pytest.param(2, "bands/partition-*", marks=pytest.mark.more),
        pytest.param(4, "asked/section-*", marks=pytest.mark.slow),
        pytest.param(2, "links/partition-*", marks=pytest.mark.slow),
        pytest.param(4, "training/section-*", marks=pytest.mark.slow),
    ],
)
def test_workers_kills_and_divisions_change_no_byte(
    num_workers: int, after: str, corpus: Path, undivided: dict[str, Any], tmp_path: Path
) -> None:
    job = start(corpus, tmp_path, num_workers=num_workers, task_bytes=60_000)
    if after:
        kill_a_worker(job, tmp_path, after=after)
    assert finish(job) == undivided


@pytest.mark.slow
def test_a_launcher_killed_in_the_middle_repeats_nothing(
    corpus: Path, undivided: dict[str, Any], tmp_path: Path
) -> None:
    job = start(corpus, tmp_path, num_workers=2, task_bytes=60_000)
    wait_until(
        lambda: any(tmp_path.glob("storage/tokens/*/index/*/asked/*")),
        poll_s=0.01,
        why=lambda: "no such step",
    )
    processes = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=limit_s(30))
    job.communicate()
    index = next(tmp_path.glob("storage/tokens/*/index"))
    kept = {path: path.stat().st_mtime_ns for path in index.rglob("*") if path.is_file()}
    again = start(corpus, tmp_path, num_workers=2, task_bytes=60_000)
    times: dict[Path, int] = {}

    def is_selected() -> bool:
        """The index is removed with the last shard."""
        times.update({path: path.stat().st_mtime_ns for path in kept if path.exists()})
        return any(index.glob("*/settled-*/*")) or again.poll() is not None

    wait_until(is_selected, poll_s=0.01, why=lambda: "no such step")
    assert {path: times[path] for path in kept} == kept
    assert finish(again) == undivided
