"""The slices of the slow tests are all of them, each once and none too long; a commit has another
slice than the one before it, and a session that takes too long says where."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from itertools import chain
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest

from tests.repository import REPOSITORY
from tests.slices import (
    LONGEST_PART_S,
    Slice,
    SlicePlugin,
    TimeLimit,
    divided,
    files_in_order,
    known_seconds,
    number_of_commit,
    seconds_of_files,
)
from tests.time_limits import limit_s

LONGEST_SLICE_S = 840.0
"""Estimated; `make test-slice` ends a session after 1,080 s."""


def variable(name: str) -> str:
    """Returns a variable of the Makefile."""
    match = re.search(rf"^{name} \?= (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def collected(*words: str) -> Counter[str]:
    """Returns the tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return Counter(line for line in done.stdout.splitlines() if "::" in line)


@pytest.mark.parametrize("count", [1, 2, 7, 14])
def test_every_file_lies_in_the_slices_once(count: int) -> None:
    slices = divided(seconds_of_files(), count)
    assert len(slices) == count
    parts = Counter(chain.from_iterable(slices))
    on_disk = {
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tests/**/test_*.py")
    }
    assert set(parts.values()) == {1}
    assert {file for file, _, _ in parts} == on_disk
    for file in on_disk:
        numbers = sorted((part, num_parts) for name, part, num_parts in parts if name == file)
        assert numbers == [(part, len(numbers)) for part in range(len(numbers))]


def test_no_slice_is_too_long() -> None:
    seconds, count = seconds_of_files(), int(variable("SLICES"))
    lengths = []
    for parts in divided(seconds, count):
        lengths.append(sum(seconds[file] / num_parts for file, _, num_parts in parts))
    print([round(length) for length in lengths])
    assert max(lengths) <= LONGEST_SLICE_S < float(variable("LIMIT_S"))
    assert max(lengths) - min(lengths) < LONGEST_PART_S / 2


def test_the_table_names_slow_files_alone() -> None:
    for file in known_seconds():
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        assert "mark.slow" in text or file.startswith("tests/chaos/"), file


def test_a_new_file_moves_no_file_of_the_table() -> None:
    known = known_seconds()
    before = divided(known, 5)
    after = divided(known | {"tests/jobs/test_new.py": 60.0}, 5)
    added = [set(new) - set(old) for new, old in zip(after, before, strict=True)]
    assert sorted(map(len, added)) == [0, 0, 0, 0, 1]


def test_a_file_whose_tests_build_on_each_other_lies_in_one_slice() -> None:
    readers = "tests/e2e/test_readme.py"
    assert readers in files_in_order()
    slices = divided({readers: 3 * LONGEST_PART_S, "tests/jobs/test_new.py": 3 * LONGEST_PART_S}, 5)
    parts = list(chain.from_iterable(slices))
    assert parts.count((readers, 0, 1)) == 1
    assert [num_parts for _, _, num_parts in parts] == [1, 3, 3, 3]


@pytest.mark.more
def test_the_slices_of_a_few_files_are_their_slow_tests() -> None:
    """With real pytest; the longer suite does it with all files."""
    files = (
        "tests/serving/delivery/test_autoscaling.py",
        "tests/cluster/stages/test_run_mirrored.py",
    )
    words = ("-m", "slow", *files)
    whole = collected(*words)
    slices = [collected(*words, "--slice", f"{number}/2") for number in (1, 2)]
    assert slices[0] + slices[1] == whole
    assert {test.partition("::")[0] for test in whole} == {*files}


@pytest.mark.slow
def test_all_slices_together_are_the_slow_tests() -> None:
    whole = collected("-m", "slow", "tests")
    count, slices = int(variable("SLICES")), []
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    for number in range(1, count + 1):
        items: list[Any] = [SimpleNamespace(nodeid=test) for test in whole]
        SlicePlugin(Slice(number, count)).pytest_collection_modifyitems(config, items)
        slices.append(Counter(item.nodeid for item in items))
    assert sum(slices, Counter()) == whole
    assert len(whole) > 300 and all(slices)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b"])
def test_a_slice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="expected K/N with 1 <= K <= N"):
        Slice.parse(text)


def git(folder: Path, *words: str) -> None:
    people = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    command = ["git", "-c", "protocol.file.allow=always", *words]
    subprocess.run(command, cwd=folder, env=os.environ | people, check=True, capture_output=True)


def test_each_commit_has_the_next_number_and_a_shallow_clone_or_none_has_one_too(
    tmp_path: Path,
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    git(full, "init", "--quiet")
    for number in (1, 2, 3):
        git(full, "commit", "--quiet", "--allow-empty", "--message", str(number))
        assert number_of_commit(full) == number
    git(tmp_path, "clone", "--quiet", "--depth", "1", full.as_uri(), "shallow")
    first = number_of_commit(tmp_path / "shallow")
    git(tmp_path / "shallow", "commit", "--quiet", "--allow-empty", "--message", "more")
    assert number_of_commit(tmp_path / "shallow") != first > 3
    bare = tmp_path / "export"
    bare.mkdir()
    (bare / ".git").write_text("gitdir: nowhere")  # so that git asks no folder above
    assert number_of_commit(bare) > 20_000, "days"


def test_a_session_that_takes_too_long_says_in_which_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted, words = threading.Event(), []
    monkeypatch.setattr("os.kill", lambda *_: interrupted.set())
    limit = TimeLimit(0.2, say=words.append, end_s=1e6)
    limit.pytest_runtest_logstart("tests/test_a.py::test_b")
    assert interrupted.wait(limit_s(5))
    with pytest.raises(pytest.exit.Exception, match="limit is over"):
        limit.pytest_runtest_logstart("tests/test_a.py::test_c")
    limit.pytest_unconfigure()
    assert "limit of 0 s ended in tests/test_a.py::test_b" in words[0]


def test_an_interrupt_waits_for_a_place_that_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    again = threading.Event()
    monkeypatch.setattr("os.kill", lambda *_: again.set())
    limit = TimeLimit(1e6, say=print)
    interrupt = signal.getsignal(signal.SIGINT)
    assert callable(interrupt)
    interrupt(signal.SIGINT, cast("FrameType", SimpleNamespace(f_lineno=None)))
    assert again.wait(limit_s(5))
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, sys._getframe())
    limit.pytest_unconfigure()
    assert signal.getsignal(signal.SIGINT) is not interrupt


def test_pytest_ends_within_its_limit() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--limit-s", "0.01"]
    done = subprocess.run(
        [*command, "tests/test_readmes.py"],  # which takes seconds
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the tests' limit of 0 s ended" in done.stdout
