"""The four folders of code, wherever they are installed: their version, their hash, and a copy of them for a job."""

import hashlib
import shutil
from importlib import metadata
from pathlib import Path

CODE_FOLDERS = ("model", "cluster", "jobs", "serving")

CODE_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds them side by side: the repository, or `site-packages`."""


def version() -> str:
    """Returns the installed version; the copy that a job works in has none."""
    try:
        return metadata.version("raymill")
    except metadata.PackageNotFoundError:
        return "not installed"


def snapshot_code(folder: Path) -> None:
    """Copies the code folders into `folder`, without the manifests, which no job needs."""
    for name in CODE_FOLDERS:
        shutil.copytree(CODE_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "k8s"))


def code_version() -> str:
    """Returns the SHA-256 over the names and bytes of the folders' Python files, which each checkpoint records."""
    digest = hashlib.sha256()
    for name in CODE_FOLDERS:
        for path in sorted((CODE_ROOT / name).rglob("*.py")):
            digest.update(path.relative_to(CODE_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
