"""Runs `raymill cluster` in this process against a stand-in for the API, and says which rights it
needed."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.manifests import Manifest, find, render

RAY, CORE = "/apis/ray.io/v1/namespaces/raymill", "/api/v1/namespaces/raymill"
Right = tuple[str, str, str]
"""An (API group, resource, verb)."""


@contextmanager
def stand_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[ApiStandIn]:
    """Serves a stand-in that `raymill cluster` finds, and checks that all requests but applying are
    an operator's rights."""
    with ApiStandIn(folder, **settings).serving() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig()))
        yield api
        assert {
            _right(line) for line in api.requests if not _is_anybodys(line)
        } <= operators_rights()


@functools.cache
def operators_rights() -> frozenset[Right]:
    return frozenset(
        (group, resource, verb)
        for rule in find(render("base"), "Role/raymill-operator")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    )


def _is_anybodys(request: str) -> bool:
    """Says whether a request is an apply, which tests look at themselves, or one of an
    administrator who applies `platform` and looks for what is left over, or asks which kinds there
    are, as everybody may."""
    path = request.partition(" ")[2]
    is_administrators = "labelSelector=app.kubernetes.io%2Fpart-of" in path
    return request.startswith("APPLY") or is_administrators or "/namespaces/" not in path


def _right(request: str) -> Right:
    method, path = request.split()
    root, _, rest = path.partition("?")[0].partition("/namespaces/raymill/")
    resource, _, name = rest.partition("/")
    group = root.split("/")[2] if root.startswith("/apis/") else ""
    return (
        group,
        resource,
        {"GET": "get" if name else "list", "POST": "create"}.get(method, method.lower()),
    )


class Asked:
    """Runs the command and returns what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str, code: int = 0) -> dict[str, Any]:
        """Returns the result."""
        assert main(["cluster", *argv, "--json"]) == code
        return json.loads(self._capsys.readouterr().out.splitlines()[-1])

    def refused(self, *argv: str, code: int = 1) -> str:
        """Returns the error."""
        assert main(["cluster", *argv]) == code
        return self._capsys.readouterr().err


def ray_object(api: ApiStandIn, kind: str, name: str) -> Manifest:
    found = api.get(f"{RAY}/{kind.lower()}s/{name}")
    assert found is not None, f"there is no {kind}/{name}"
    return found


def cluster_behind(api: ApiStandIn, owner: Manifest) -> Manifest:
    """Returns the newest RayCluster that was made for the object."""
    mine = [
        item["metadata"]["name"]
        for item in api.list(f"{RAY}/rayclusters")["items"]
        if any(
            o["uid"] == owner["metadata"]["uid"]
            for o in item["metadata"].get("ownerReferences", [])
        )
    ]
    return ray_object(api, "RayCluster", mine[-1])
