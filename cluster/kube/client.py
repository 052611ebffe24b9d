"""The Kubernetes API by its official client, which is an extra: plain objects, and errors in words."""

import json
import os
from typing import Any

from cluster.kube.scale import Patch
from cluster.kube.status import Object
from cluster.local.local_cluster import ClusterError
from model.errors import UserError

try:
    from kubernetes import config
    from kubernetes.client import ApiClient
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError
except ImportError as error:
    raise UserError(f"{error}: `pip install 'raymill[k8s]'` brings the Kubernetes client") from None

FIELD_MANAGER = "raymill"
_TIMEOUT_S = 30


class KubeApi:
    """One namespace of the Kubernetes cluster in the kubeconfig's current context, or of this pod's cluster.

    Raises `ClusterError` where no Kubernetes is configured.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        try:
            path = os.environ.get("KUBECONFIG")  # which the client reads only once
            config.load_kube_config(config_file=path) if path else config.load_config()
        except config.ConfigException as error:
            raise ClusterError(f"no Kubernetes is configured ({error}): set KUBECONFIG, or run this in a pod") from None
        self._client = ApiClient()

    def all(self, api_version: str, kind: str, *, selector: str = "") -> list[Object]:
        """Returns the namespace's objects of a kind, with the labels of `selector`; none if the kind is unknown."""
        query = [("labelSelector", selector)] if selector else []
        found = self._ask("GET", _path(api_version, kind, self.namespace), query=query, missing_is_none=True)
        items = found["items"] if found else []
        return [{"apiVersion": api_version, "kind": kind} | item for item in items]  # a list's items do not say it

    def get(self, api_version: str, kind: str, name: str) -> Object | None:
        path = f"{_path(api_version, kind, self.namespace)}/{name}"
        found: Object | None = self._ask("GET", path, missing_is_none=True)
        return found

    def patch(self, manifest: Object, patch: Patch) -> None:
        """Patches the object. Raises `ClusterError` if it has changed so that the patch does not fit."""
        self._ask("PATCH", _path_of(manifest), body=patch, content_type="application/json-patch+json")

    def apply(self, manifest: Object, *, dry_run: bool = False) -> Object:
        """Applies on the server's side, so fields of other owners stay theirs, such as the autoscaler's number of pods.

        Returns the resulting object.
        """
        query = [("fieldManager", FIELD_MANAGER), *([("dryRun", "All")] if dry_run else [])]
        content_type = "application/apply-patch+yaml"
        made: Object = self._ask("PATCH", _path_of(manifest), query=query, body=manifest, content_type=content_type)
        return made

    def delete(self, api_version: str, kind: str, name: str) -> None:
        """Deletes the object if it exists."""
        self._ask("DELETE", f"{_path(api_version, kind, self.namespace)}/{name}", missing_is_none=True)

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        missing_is_none: bool = False,
    ) -> Any:
        try:
            return self._client.call_api(
                path,
                method,
                query_params=query or [],
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
                response_types_map={200: "object", 201: "object"},
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT_S,
            )
        except ApiException as error:
            if error.status == 404 and missing_is_none:
                return None
            raise ClusterError(_words(error, method, path)) from None
        except HTTPError as error:
            host = self._client.configuration.host
            raise ClusterError(f"no Kubernetes API answers at {host}: {str(error).splitlines()[0][:300]}") from None


def _path(api_version: str, kind: str, namespace: str | None) -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    word = kind.lower()
    plural = f"{word[:-1]}ies" if word.endswith(("cy", "ty")) else f"{word}{'es' if word[-1] == 's' else 's'}"
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


def _path_of(manifest: Object) -> str:
    metadata = manifest["metadata"]
    return f"{_path(manifest['apiVersion'], manifest['kind'], metadata.get('namespace'))}/{metadata['name']}"


def _words(error: ApiException, method: str, path: str) -> str:
    what = path.rsplit("/namespaces/", maxsplit=1)[-1]
    message = json.loads(error.body).get("message", "") if error.body else ""
    if error.status == 401:
        return "Kubernetes does not know who you are: log in again, so that the kubeconfig has a valid token"
    if error.status == 403:
        return (
            f"you may not {method} {what}: k8s/base/rbac.yaml gives the group raymill-operators that right ({message})"
        )
    if error.status == 404:
        return f"there is no {what}, or its kind is not installed: apply KubeRay's operator and the namespace first"
    if error.status == 409:
        return f"another field manager owns a part of {what}: {message}"
    return f"Kubernetes refused {method} {what} with {error.status}: {message or error.reason}"
