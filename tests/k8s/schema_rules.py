"""Validates against schemas: the CRDs for Ray's kinds as the API server reads them,
`kubernetes-validate` for others."""

import functools
import json
from typing import Any

import jsonschema
import yaml
from kubernetes_validate import latest_version
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from tests.k8s.manifests import CRDS, Manifest, name_of, of_kind, pods

# Kueue's, whose schemas are not at hand
QUEUE_KINDS = ("ClusterQueue", "LocalQueue", "ResourceFlavor", "Topology")
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
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.where}, "spec": pod.spec}
        for pod in pods(objects)
    ]
    builtin = (o for o in objects if o["kind"] not in (*RAY_KINDS, *QUEUE_KINDS, *GATEWAY_KINDS))
    found = (_builtin_problem(json.dumps(manifest)) for manifest in (*builtin, *inside))
    return [problem for problem in found if problem is not None]


@functools.cache
def _builtin_problem(text: str) -> str | None:
    """Each object once, as most are in every overlay."""
    manifest = json.loads(text)
    error = jsonschema.exceptions.best_match(
        _validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
    )
    return None if error is None else f"{name_of(manifest)}: {error.message}"


@functools.cache
def _validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """Each once: `kubernetes_validate.validate` reads the definitions of all kinds for every
    object, 0.1 s each time."""
    group, _, version = api_version.rpartition("/")
    schema = _builtin_schema("-".join(filter(None, (kind.lower(), group.split(".")[0], version))))
    return jsonschema.Draft202012Validator(
        schema, registry=Resource.from_contents(schema) @ _definitions()
    )


@functools.cache
def _definitions() -> Registry[Any]:
    return (Resource.from_contents(_builtin_schema("_definitions")) @ Registry()).crawl()


def _builtin_schema(name: str) -> Any:
    return schema_contents(
        f"kubernetes-json-schema/v{latest_version()}-local-strict/{name}.json", latest_version()
    )


@functools.cache
def _schema(kind: str) -> Manifest:
    definition = yaml.load(
        (CRDS / f"ray.io_{kind.lower()}s.yaml").read_bytes(), Loader=yaml.CSafeLoader
    )
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    _forbid_unknown(schema)
    return schema


def _forbid_unknown(schema: Any) -> None:
    """Refuses unknown fields as `kubectl apply` does; JSON Schema accepts them by default."""
    if isinstance(schema, list):
        for item in schema:
            _forbid_unknown(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not schema.get(
            "x-kubernetes-preserve-unknown-fields"
        ):
            schema.setdefault("additionalProperties", False)
        for child in schema.values():
            _forbid_unknown(child)


def _as_stored(value: Any, schema: Manifest) -> Any:
    """Returns the value with nulls pruned and defaults filled in, as the API server does before it
    checks `required`."""
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
    return {
        key: child["default"] for key, child in properties.items() if "default" in child
    } | stored


RULES = (crd_problems, builtin_problems)
