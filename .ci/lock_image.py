"""Writes which packages the image is made of, each with the hash of its wheel for Linux on x86-64:
image-*.txt.

    python .ci/lock_image.py cpu gpu vllm

Asks pip what it would install, by Python 3.11 as in the image, and installs nothing. For `cpu`,
pip's own settings (PIP_EXTRA_INDEX_URL) lead it to PyTorch's CPU builds or a mirror of them; for
`gpu`, they must not. A list names no index: the hash alone says which build it is, so it is always
an index's. A wheel in a folder of this machine may be a build that nobody else has.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONSTRAINTS = ["--constraint", str(HERE / "constraints.txt")]
WANTED: dict[str, list[str]] = {
    "cpu": CONSTRAINTS,
    "gpu": CONSTRAINTS,
    "vllm": ["vllm==0.32.0"],  # an environment of its own: vLLM pins a torch of its own
}


def main(names: list[str]) -> int:
    for name in names:
        path, packages = HERE / f"image-{name}.txt", asked(name)
        (torch,) = (
            each["metadata"]["version"] for each in packages if each["metadata"]["name"] == "torch"
        )
        if torch.endswith("+cpu") is not (name == "cpu"):
            sys.stderr.write(
                f"{path} is left as it was: pip chose torch {torch}; see PIP_EXTRA_INDEX_URL above\n"
            )
            return 1
        downloads = [
            each["download_info"] for each in packages if "archive_info" in each["download_info"]
        ]
        if unpublished := [download["url"] for download in downloads if not is_published(download)]:
            sys.stderr.write(
                f"{path} is left as it was: pip chose {', '.join(unpublished)}, whose hash no index gives; lead pip to "
                "one that does, and away from folders (PIP_FIND_LINKS)\n"
            )
            return 1
        path.write_text(lock(name, packages), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
    return 0


def asked(name: str) -> list[dict[str, Any]]:
    """Returns what pip would install."""
    ours = [] if name == "vllm" else [f"{HERE.parent}[sign,structured]", "setuptools>=77"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += [
        "--use-feature",
        "fast-deps",
        "--only-binary",
        ":all:",
        "--report",
        "-",
        *WANTED[name],
        *ours,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    installed: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return installed


def lock(name: str, packages: list[dict[str, Any]]) -> str:
    """Returns a requirements file of the packages, without this project itself."""
    lines = [f"# Made by `python .ci/lock_image.py {name}`."]
    for package in sorted(packages, key=lambda each: normal(each["metadata"]["name"])):
        if "archive_info" in package["download_info"]:
            found = package["metadata"]
            lines += [
                f"{normal(found['name'])}=={found['version'].partition('+')[0]} \\",
                f"    --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}",
            ]
    return "\n".join(lines) + "\n"


def is_published(download: dict[str, Any]) -> bool:
    """Tells whether an index gives the wheel and its hash; of one in a folder, pip may have taken
    the hash itself."""
    return not download["url"].startswith("file:") and "sha256" in download["archive_info"].get(
        "hashes", {}
    )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
