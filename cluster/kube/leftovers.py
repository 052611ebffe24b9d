"""Finds what is in a namespace although the overlay no longer has it, such as a budget of an
earlier version. Pure."""

import json

from cluster.kube.status import KINDS, Object, full_name, run_of

PART_OF_RAYMILL = "app.kubernetes.io/part-of=raymill"


def kinds_of(manifests: list[Object]) -> list[tuple[str, str]]:
    """Returns the API version and kind of everything that an overlay has in a namespace."""
    kinds = {(o["apiVersion"], o["kind"]): None for o in manifests if "namespace" in o["metadata"]}
    return list(kinds)


def leftovers(live: list[Object], manifests: list[Object]) -> list[Object]:
    """Returns the live objects that the manifests lack, without objects that another object or a
    submitted run owns, and without settings that something live still names."""
    wanted = set(map(full_name, manifests))
    users = json.dumps([o["spec"] for o in live if o["kind"] in (*KINDS, "StatefulSet")])
    return [
        manifest
        for manifest in live
        if full_name(manifest) not in wanted
        and not manifest["metadata"].get("ownerReferences")
        and run_of(manifest) is None
        and not (manifest["kind"] == "ConfigMap" and f'"{manifest["metadata"]["name"]}"' in users)
    ]


def removal(objects: list[Object], namespace: str) -> str:
    """Returns the command that removes the objects."""
    names = " ".join(
        f"{manifest['kind'].lower()}/{manifest['metadata']['name']}" for manifest in objects
    )
    return f"kubectl -n {namespace} delete {names}"
