"""Each rule catches its violation: `planted_violations.yaml` spoils good manifests one by one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import (
    life_rules,
    network_rules,
    operator_rules,
    run_rules,
    schema_rules,
    security_rules,
)
from tests.k8s.manifests import CRDS, Manifest, find, render

pytestmark = pytest.mark.more

_RULES = {
    rule.__name__: rule
    for module in (
        operator_rules,
        security_rules,
        life_rules,
        network_rules,
        run_rules,
        schema_rules,
    )
    for rule in module.RULES
}
_VIOLATIONS: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "planted_violations.yaml").read_text(encoding="utf-8")
)
_SHORTHANDS = {
    "box.": "worker.containers.0.",
    "head.": "cluster.headGroupSpec.template.spec.",
    "worker.": "cluster.workerGroupSpecs.0.template.spec.",
}


@pytest.mark.parametrize(
    "violation", _VIOLATIONS, ids=lambda violation: f"{violation['rule']}: {violation['says']}"
)
def test_is_caught(violation: dict[str, Any]) -> None:
    if violation["rule"] == "crd_problems" and not CRDS.is_dir():
        pytest.skip(f"no KubeRay CRDs at {CRDS}")
    problems = _RULES[violation["rule"]](_spoilt(violation))
    assert any(violation["says"] in problem for problem in problems), problems


_SERVE_VIOLATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("config_problems", {"args": {"replica": {}}}, "replica"),
    ("config_problems", {"args": {"host": "127.0.0.1"}}, "two addresses"),
    ("config_problems", {"route_prefx": "/"}, "route_prefx is unknown"),
    ("entry_problems", {"import_path": "serving.app:run"}, "is no builder"),
    ("entry_problems", {"import_path": "serving.app:build"}, "is no builder"),
    ("entry_problems", {"args": {"api_key_file": "/etc/keys"}}, "/etc/keys is not mounted"),
    ("storage_problems", {"args": {"storage": {"uri": "s3://other"}}}, "reads from s3://other"),
    ("capacity_problems", {"args": {"replicas": {"max_replicas": 9}}}, "ask for up to 9"),
    (
        "gpu_problems",
        {"args": {"engine": {"device": "cuda"}}},
        "which only the image raymill-gpu has",
    ),
]


@pytest.mark.parametrize(("rule", "change", "says"), _SERVE_VIOLATIONS, ids=str)
def test_is_caught_inside_the_serve_config(rule: str, change: dict[str, Any], says: str) -> None:
    objects = render("base")
    service = find(objects, "RayService/completions")
    deploy = yaml.safe_load(service["spec"]["serveConfigV2"])
    application = deploy["applications"][0]
    application |= change | {"args": application["args"] | change.get("args", {})}
    service["spec"]["serveConfigV2"] = yaml.safe_dump(deploy)
    problems = _RULES[rule](objects)
    assert any(says in problem for problem in problems), problems


def test_every_rule_has_a_violation() -> None:
    planted = {violation["rule"] for violation in _VIOLATIONS} | {
        rule for rule, _, _ in _SERVE_VIOLATIONS
    }
    assert planted == set(_RULES)


def _spoilt(violation: dict[str, Any]) -> list[Manifest]:
    objects = render(violation.get("of", "base"))
    if "add" in violation:
        return [*objects, violation["add"]]
    manifest = find(objects, violation.get("in", "RayJob/pretrain"))
    if "remove" in violation:
        parent, key = _place(manifest, violation["remove"])
        del parent[key]
    for path, value in violation.get("put", {}).items():
        parent, key = _place(manifest, path)
        parent[key] = value
    return objects


def _place(manifest: Manifest, path: str) -> tuple[Any, Any]:
    """Returns the container of the field that `path` names, and its key there."""
    for short, long in _SHORTHANDS.items():
        path = long + path.removeprefix(short) if path.startswith(short) else path
    inside = {"RayJob": "spec.rayClusterSpec.", "RayService": "spec.rayClusterConfig."}.get(
        manifest["kind"], "spec."
    )
    path = path.replace("cluster.", inside)
    steps = path.split(".")
    value: Any = manifest
    while steps:
        # Keys may hold dots themselves (`run.yaml`, `nvidia.com/gpu`): the last one is all that is
        # no key on its own.
        if isinstance(value, list):
            step: Any = int(steps[0])
        elif len(steps) == 1 or steps[0] not in value:
            return value, ".".join(steps)
        else:
            step = steps[0]
        if len(steps) == 1:
            return value, step
        value, steps = value[step], steps[1:]
    raise AssertionError(path)
