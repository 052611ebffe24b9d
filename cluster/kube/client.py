"""The Kubernetes API by its official client, which is an extra: plain objects, and errors in words."""

import json
import os
import re
from typing import Any

from cluster.kube.scale import Patch, as_applied
from cluster.kube.status import KINDS, Object, full_name
from cluster.local.jobs_api import ClusterError
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
_TRIES = 5  # of an apply, since the operator and the autoscaler may write in between


class KubeApi:
    """One namespace, `raymill` if it is None, of the cluster in the kubeconfig's current context, or of this pod's.
    Raises `ClusterError` where no Kubernetes is configured."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace or "raymill"
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
        return self._ask("GET", path, missing_is_none=True)

    def patch(self, manifest: Object, patch: Patch) -> None:
        """Patches the object. Raises `ClusterError` if it has changed so that the patch does not fit."""
        query = [("fieldManager", FIELD_MANAGER)]
        self._ask("PATCH", _path_of(manifest), query=query, body=patch, content_type="application/json-patch+json")

    def apply(self, manifest: Object, *, dry_run: bool = False, force: bool = False) -> Object:
        """Applies on the server's side, and returns the resulting object. Raises `ClusterError` if another field
        manager owns what would change, unless `force` takes it."""
        query = [("fieldManager", FIELD_MANAGER)]
        query += [("dryRun", "All")] * dry_run + [("force", "true")] * force
        kind = "application/apply-patch+yaml"
        return self._ask("PATCH", _path_of(manifest), query=query, body=manifest, content_type=kind)

    def apply_all(self, manifests: list[Object], *, dry_run: bool = False) -> dict[str, Any]:
        """Applies each object, whether or not others fail. Returns which were applied, what was kept as it ran, which
        failed and why, and, for a dry run, which cannot be checked before their namespace exists."""
        result: dict[str, Any] = {"checked" if dry_run else "applied": (taken := [])}
        for manifest in manifests:
            name = full_name(manifest)
            try:
                kept = self._apply_as_it_runs(manifest, dry_run=dry_run)
            except _RefusedError as error:
                if dry_run and error.lacks_namespace:
                    result.setdefault("not_checked", []).append(name)
                else:
                    result.setdefault("failed", {})[name] = str(error)
                continue
            taken.append(name)
            if kept:
                result.setdefault("kept", {})[name] = kept
        return result

    def _apply_as_it_runs(self, manifest: Object, *, dry_run: bool) -> list[str]:
        """Applies one object with what `as_applied` keeps, and returns lines that say what that is.

        Ray's kinds are applied by force: a list of worker groups has one owner, and KubeRay and the autoscaler write it
        too. So what is theirs is read from the object first, and its version shows whether they wrote since.
        """
        if manifest["kind"] not in KINDS:
            self.apply(manifest, dry_run=dry_run)
            return []
        for tries_left in reversed(range(_TRIES)):
            live = self._ask("GET", _path_of(manifest), missing_is_none=True)
            wanted, kept = as_applied(manifest, live)
            try:
                self.apply(wanted, dry_run=dry_run, force=True)
                break
            except _RefusedError as error:
                if error.status != 409 or not tries_left:
                    raise
        return kept

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
            if error.status == 401:
                raise ClusterError("Kubernetes does not know who you are: log in again, for a valid token") from None
            raise _RefusedError(error, method, path) from None
        except HTTPError as error:
            host = self._client.configuration.host
            raise ClusterError(f"no Kubernetes API answers at {host}: {str(error).splitlines()[0][:300]}") from None


class _RefusedError(ClusterError):
    """Kubernetes refused a request."""

    def __init__(self, error: ApiException, method: str, path: str) -> None:
        self.status = error.status
        try:
            said = json.loads(error.body or "{}")
        except json.JSONDecodeError:  # plain text for a kind that is not installed
            said = {}
        self.lacks_namespace = error.status == 404 and (said.get("details") or {}).get("kind") == "namespaces"
        super().__init__(self._words(said, method, path) or f"Kubernetes refused {method} {path}: {error.reason}")

    def _words(self, said: Object, method: str, path: str) -> str:
        what, message = path.rsplit("/namespaces/", maxsplit=1)[-1], said.get("message", "")
        if self.status == 403 and "exceeded quota" not in message:
            group = "k8s/base/rbac.yaml gives the group raymill-operators that right"
            return f"you may not {method} {what}: {group} ({message})"
        if self.lacks_namespace:
            return f"{what}: the namespace is not there: apply the component `platform` first"
        if self.status == 404 and (not message or "could not find the requested resource" in message):
            return f"{what}: its kind is not installed: apply KubeRay's operator, or Kueue, first"
        if self.status == 404:
            return f"there is no {what}"
        if self.status == 409:
            return f"another field manager owns a part of {what}: {message}"
        return f"Kubernetes refused {method} {what} with {self.status}: {message}" if message else ""


def _path(api_version: str, kind: str, namespace: str | None) -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    plural = re.sub(r"s$", "se", re.sub(r"(?<![aeiou])y$", "ie", kind.lower())) + "s"  # policies, classes
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


def _path_of(manifest: Object) -> str:
    metadata = manifest["metadata"]
    return f"{_path(manifest['apiVersion'], manifest['kind'], metadata.get('namespace'))}/{metadata['name']}"
