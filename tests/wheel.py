"""Builds raymill's wheel from a copy of the checkout, and names the modules that need an extra."""

import shutil
import subprocess
import sys
from pathlib import Path

from cluster.settings.code_folders import CODE_FOLDERS
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

# Whole modules, imported only by the commands that name the extra, and by each other
OF_AN_EXTRA = {
    "cluster/kube/client.py": {"kubernetes", "urllib3"},
    "serving/engine/vllm_engine.py": {"vllm"},  # in an environment of its own
    "serving/engine/vllm_grammars.py": {"vllm"},
    "serving/engine/vllm_weights.py": {"vllm"},
}


def copied(folder: Path) -> Path:
    """Returns a copy of the files that an installation is made from, as builds leave others beside
    them."""
    copy = folder / "checkout"
    for name in (*CODE_FOLDERS, "k8s"):
        shutil.copytree(
            REPOSITORY / name,
            copy / name,
            ignore=shutil.ignore_patterns("__pycache__"),
            symlinks=True,
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, copy)
    return copy


def build_wheel(folder: Path) -> tuple[Path, str]:
    """Returns the wheel and the whole output."""
    copy = copied(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(copy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s(120),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr
