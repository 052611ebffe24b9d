"""What a proof was made on: cards, driver and versions, as one JSON object.

    python -m tests.gpu.proof.machine

In a process of its own, as it asks CUDA.
"""

import json
import platform
import subprocess
from importlib import metadata

import torch

from cluster.settings.code_folders import code_version, version
from raymill.proof.__main__ import processor

_PACKAGES = ("torch", "triton", "numpy", "transformers", "ray", "vllm")


def facts() -> dict[str, object]:
    cards: list[str] = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        cards.append(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}")
    nccl = torch.cuda.nccl.version() if torch.version.cuda else None
    return {
        "cards": cards,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "processor": processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "raymill": f"{version()}, code {code_version()}",
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(facts()))
