"""The Makefile tells a person what it can do, what it does, and what was mistyped."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.areas import areas
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

# Python, as far as an installation asks it: an environment's is itself, and pip takes some seconds.
PYTHON = """\
#!/bin/sh
case "$*" in
    *venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *--editable*) sleep 4 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a folder with what the Makefile reads, and a Python in which nothing is installed."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "PYTHON=./python", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=limit_s(60)
    )


def test_make_alone_lists_the_targets_and_installs_nothing(checkout: Path) -> None:
    listed = make(checkout).stdout
    told = re.findall(r"^([a-z-]+):.*## ", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert len(told) > 10
    assert [line.split()[1] for line in listed.splitlines()] == told
    assert not (checkout / ".venv").exists()


def test_an_area_that_does_not_exist_is_named_with_those_that_do(checkout: Path) -> None:
    done = make(checkout, "test", "AREA=jobs/exakt")
    assert done.returncode == 2
    assert "There is no area jobs/exakt" in done.stderr
    assert set(areas()) <= set(done.stderr.split())
    assert not (checkout / ".venv").exists()


def test_an_installation_without_a_terminal_says_that_it_goes_on(checkout: Path) -> None:
    done = make(checkout, "install", "TELL_S=1")
    assert done.returncode == 0, done.stderr
    first, *_, last = lines = done.stdout.splitlines()
    assert first.startswith("Installing raymill") and last.startswith("Installed: ")
    assert any(re.match(r"installing since \d s: \.venv has \d", line) for line in lines)
