"""The code folders, wherever they are installed: version, hash, and a copy for a job."""

import hashlib
import shutil
from pathlib import Path

CODE_FOLDERS = ("raymill", "model", "cluster", "jobs", "serving")

CODE_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds them: the repository, or `site-packages`."""
_SUFFIXES = (".py", ".toml", ".cpp", ".h")


def version() -> str:
    """Returns the installed version; a job's copy has none."""
    from importlib import metadata  # noqa: PLC0415 (a seventh of the time of `raymill --help`)

    try:
        return metadata.version("raymill")
    except metadata.PackageNotFoundError:
        return "not installed"


def snapshot_code(folder: Path) -> None:
    """Copies the code folders into `folder`, without the manifests, which no job needs."""
    for name in CODE_FOLDERS:
        shutil.copytree(
            CODE_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "k8s")
        )


def code_version() -> str:
    """Returns the SHA-256 over names and bytes of the folders' sources and tables; each checkpoint
    records it."""
    digest = hashlib.sha256()
    for name in CODE_FOLDERS:
        files = [path for path in (CODE_ROOT / name).rglob("*") if path.suffix in _SUFFIXES]
        for path in sorted(files):
            digest.update(
                path.relative_to(CODE_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()


OVERLAYS = CODE_ROOT / "cluster" / "k8s" / "overlays"
"""Kustomizations for kinds of clusters; by a link, so that a wheel has them too."""


def overlay_names() -> list[str]:
    return sorted(folder.name for folder in OVERLAYS.glob("*") if folder.is_dir())
