"""Renders a kustomization with `kubectl kustomize`, which asks no cluster."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.settings.code_folders import OVERLAYS, overlay_names
from cluster.settings.parser import ConfigError
from model.tables import pip_line
from raymill.errors import UserError


def overlay_folder(name: str) -> Path:
    """Returns the folder of one of raymill's overlays by its name, or the named folder. Raises
    `ConfigError`."""
    for folder in (OVERLAYS / name, Path(name)):
        if folder.is_dir():
            return folder
    known = overlay_names()
    choices = (
        f"one of {', '.join(known)}, or the folder"
        if known
        else "there is no k8s/ here, so name the folder"
    )
    raise ConfigError(f"unknown overlay {name!r}, expected {choices} of your own kustomization")


def rendered_overlay(folder: Path, namespace: str | None = None) -> list[dict[str, Any]]:
    """Returns the objects of a kustomization, in its own namespace unless `namespace` is given."""
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if namespace is not None and not re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise UserError(
            f"--namespace {namespace!r}: expected at most 63 of a-z, 0-9 and, within, -"
        )
    if kubectl is None:
        raise UserError(f"no kubectl is beside Python or on PATH: `{pip_line('k8s')}` brings it")
    with tempfile.TemporaryDirectory() as own:
        if namespace is not None:
            # Kustomize takes no absolute path
            resource = os.path.relpath(folder.resolve(), Path(own).resolve())
            settings = {"namespace": namespace, "resources": [resource]}
            (Path(own) / "kustomization.yaml").write_text(yaml.safe_dump(settings))
        command = [kubectl, "kustomize", str(folder) if namespace is None else own]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder} cannot be rendered: {done.stderr.strip().splitlines()[-1]}")
    # libyaml reads eight times as fast as the loader in Python.
    return [
        manifest for manifest in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if manifest
    ]
