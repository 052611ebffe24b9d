"""The package stands alone: beside torch and NumPy nothing can be imported, and the user's own files
have the names of this repository's folders."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.json_program import last_line_of
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

OWN_IMPORT_S = 0.1  # of a processor, beside torch's
HEADROOM = 3.0  # a busy machine's caches are cold
OWN_FILES = ("model.py", "jobs.py", "utils.py", "cluster/__init__.py", "serving/__init__.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a user's folder; raymill lies elsewhere, without its neighbors."""
    folder = tmp_path_factory.mktemp("project")
    for name in OWN_FILES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("IS_THE_USERS_OWN = True\n")
    shutil.copy(REPOSITORY / "tests" / "raymill" / "lone_user.py", folder / "train.py")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "raymill", folder / "site" / "raymill", ignore=ignored)
    assert compileall.compile_dir(folder / "site", quiet=1)
    return folder


@pytest.fixture(scope="module")
def facts(project: Path) -> list[dict[str, Any]]:
    """Returns what the user's script finds, as a program of its own and under `torchrun`."""
    folder = project / "state"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [run(project, "train.py"), run(project, *torchrun, "train.py", str(folder))]


def run(project: Path, *words: str) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(project / "site"), "OMP_NUM_THREADS": "1"}
    return last_line_of(*words, folder=project, env=env)


def test_ten_steps__saved_and_loaded_after_five__have_one_hash_however_workers_are_started(
    facts: list[dict[str, Any]],
) -> None:
    alone, torchrun = facts
    assert [len(alone["hashes"]), len(torchrun["hashes"])] == [3, 2]  # of one and two; of two
    assert len({*alone["hashes"], *torchrun["hashes"]}) == 1


def test_the_users_own_modules__stay_the_users_own(
    facts: list[dict[str, Any]], project: Path
) -> None:
    for found in facts:
        assert found["own"] == [True] * len(OWN_FILES)
        assert Path(found["raymill"]).is_relative_to(project / "site")


def test_the_import__loads_torch_late_and_takes_little_of_its_own(
    facts: list[dict[str, Any]],
) -> None:
    assert all(found["loads_torch_late"] for found in facts)
    assert min(found["import_s"] for found in facts) < OWN_IMPORT_S * HEADROOM


def test_a_package_that_is_not_allowed__cannot_be_imported_there(project: Path) -> None:
    """Ray, which is installed here: else the other tests would show nothing."""
    script = project / "refused.py"
    refusing, _, _ = (project / "train.py").read_text().partition("\nimport torch  #")
    script.write_text(f"{refusing}\nimport ray\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project / "site")},
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert done.returncode == 1
    assert "No module named 'ray'" in done.stderr
