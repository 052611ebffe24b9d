"""`python -m raymill.proof` shows equal hashes and ends with 0, and with 1 where one of them differs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raymill.proof.rows import OURS, PEERS, rows_of
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

HASH = r"\b[0-9a-f]{10}\b"


def proof(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raymill.proof", *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s(120),
        check=False,
    )


def hashes(output: str) -> dict[str, list[str]]:
    """Returns the hashes of each row of the table, by its name."""
    found: dict[str, list[str]] = {}
    for row in rows_of(6):
        for line in output.splitlines():
            if line.startswith(f"{row.name} "):
                found[row.name] = re.findall(HASH, line)
    return found


@pytest.mark.more
def test_another_seed_in_one_row__shows_another_hash_and_ends_with_1() -> None:
    names = ("1 worker", "4, one killed, 3", "2 workers")
    done = proof(
        "--steps", "6", "--without-peers", "--rows", *names, "--another-seed-in", "2 workers"
    )
    assert done.returncode == 1, done.stderr
    found = hashes(done.stdout)
    assert [*found] == ["1 worker", "2 workers", "4, one killed, 3"]
    others = found.pop("2 workers")
    alike = [digest for row in found.values() for digest in row]
    assert [len(alike), len(set(alike))] == [2 * len(OURS), 1]
    assert len(others) == len(OURS)
    assert {*others}.isdisjoint(alike)
    assert "raymill's 9 trainings end with 2 hashes" in done.stdout


@pytest.mark.slow
def test_the_whole_table__has_one_hash_of_raymills_and_six_of_each_peer() -> None:
    done = proof()
    assert done.returncode == 0, done.stderr
    table = hashes(done.stdout)
    assert [*table] == [row.name for row in rows_of(6)]
    assert {len(row) for row in table.values()} == {len(OURS) + len(PEERS)}
    assert len({digest for row in table.values() for digest in row[: len(OURS)]}) == 1
    for column in range(len(OURS), len(OURS) + len(PEERS)):
        assert len({row[column] for row in table.values()}) == len(table)
    # All train the same thing: what differs is rounding
    [least, most] = map(
        float, re.findall(r"between ([\d.]+) and ([\d.]+) in all 30", done.stdout)[0]
    )
    assert most - least < 1e-4


@pytest.mark.more
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu__each_way_says_why_it_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    words = ("--steps", "6", "--device", "cuda", "--rows", "1 worker", "--json", str(file))
    done = proof(*words)
    assert done.returncode == 1, done.stderr
    told = json.loads(file.read_text(encoding="utf-8"))
    assert {*told["rows"]["1 worker"].values()} == {"does not run"}
    assert told["reasons"].keys() == {*OURS, *PEERS}
    assert "none does not run here: RuntimeError: PyTorch finds no CUDA device" in done.stdout


@pytest.mark.parametrize("most_workers", [4, 8, 12])
def test_rows__have_each_number_of_workers_and_say_which_are_even(most_workers: int) -> None:
    rows = {row.name: row for row in rows_of(6, most_workers=most_workers)}
    assert len(rows) == most_workers + 2
    even = {name for name, row in rows.items() if row.is_even}
    assert {"1 worker", "4 workers", "4, one killed, 3"} <= even and "5 workers" not in even


def test_too_few_steps__are_refused() -> None:
    done = proof("--steps", "5")
    assert done.returncode == 2
    assert "--steps 5: expected 6 or more" in done.stderr
