"""Validates against schemas: the CRDs for Ray's kinds as the API server reads them, `kubernetes-validate` for others."""

import functools
import json
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.manifests import CRDS, Manifest, name_of, of_kind, pods

QUEUE_KINDS = ("ClusterQueue", "LocalQueue", "ResourceFlavor", "Topology")  # Kueue's, whose schemas are not at hand
GATEWAY_KINDS = ("Gateway", "HTTPRoute", "HealthCheckPolicy", "GCPBackendPolicy")  # nor are these
RAY_KINDS = ("RayCluster", "RayJob", "RayService", "RayCronJob")


def crd_problems(objects: list[Manifest]) -> list[str]:
    """Finds unknown, wrong and missing fields of Ray's kinds. Needs the folder of CRDs."""
    problems = []
    for manifest in of_kind(objects, *RAY_KINDS):
        schema = _schema(manifest["kind"])
        stored = _as_stored(manifest, schema)
        for error in jsonschema.Draft202012Validator(schema).iter_errors(stored):
            path = ".".join(str(step) for step in error.absolute_path)
            problems.append(f"{name_of(manifest)}: {path}: {error.message}")
    return problems


def builtin_problems(objects: list[Manifest]) -> list[str]:
    """Finds the same in the built-in kinds, and in the pods inside Ray's kinds."""
    inside = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.where}, "spec": pod.spec} for pod in pods(objects)
    ]
    builtin = (o for o in objects if o["kind"] not in (*RAY_KINDS, *QUEUE_KINDS, *GATEWAY_KINDS))
    found = (_builtin_problem(json.dumps(manifest)) for manifest in (*builtin, *inside))
    return [problem for problem in found if problem is not None]


@functools.cache
def _builtin_problem(text: str) -> str | None:
    """Each object once, as most are in every overlay and each validation reads the schemas of all kinds."""
    manifest = json.loads(text)
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{name_of(manifest)}: {error.message}"
    return None


@functools.cache
def _schema(kind: str) -> Manifest:
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_bytes(), Loader=yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    _forbid_unknown(schema)
    return schema


def _forbid_unknown(schema: Any) -> None:
    """Refuses unknown fields as `kubectl apply` does; JSON Schema accepts them by default."""
    if isinstance(schema, list):
        for item in schema:
            _forbid_unknown(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for child in schema.values():
            _forbid_unknown(child)


def _as_stored(value: Any, schema: Manifest) -> Any:
    """Returns the value with nulls pruned and defaults filled in, as the API server does before it checks `required`."""
    if isinstance(value, list):
        return [_as_stored(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    extra = schema.get("additionalProperties")
    stored = {
        key: _as_stored(item, properties.get(key, extra if isinstance(extra, dict) else {}))
        for key, item in value.items()
        if item is not None
    }
    return {key: child["default"] for key, child in properties.items() if "default" in child} | stored


RULES = (crd_problems, builtin_problems)
