"""The Kubernetes API by its official client, which is an extra: plain objects, and errors in
words."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.kube.field_ownership import KUBECTL_APPLY, taken_over
from cluster.kube.scale import Patch, as_applied
from cluster.kube.status import KINDS, Object, component_of, full_name
from cluster.local.jobs_api import ClusterError
from cluster.output.progress import say
from model.tables import pip_line
from raymill.errors import UserError

try:
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.client.exceptions import ApiException
    from urllib3 import Retry
    from urllib3.exceptions import HTTPError
except ImportError as error:
    raise UserError(f"{error}: `{pip_line('k8s')}` brings the Kubernetes client") from None

FIELD_MANAGER = "raymill"
_TIMEOUT_S = 20
_SHORT_TIMEOUT_S = (
    5  # once it has not answered: what is left to ask or to undo waits no minute more
)
_SAYS_AFTER_S = 10
_TRIES = 5  # of an apply, since the operator and the autoscaler may write in between
_RETRIES = Retry(
    total=10,
    connect=2,
    read=2,
    # s, doubled from the second retry on; a Retry-After of the server counts instead
    backoff_factor=0.1,
    # Every request of ours may be repeated: none creates under a name that Kubernetes chooses
    allowed_methods=None,
    raise_on_status=False,
)
"""Retries of a connection that was lost, and of 429 and 503 as long as Kubernetes says when to come
back. So a request to an API that is silent takes a minute, and each one after it a quarter."""


class KubeApi:
    """One namespace, `raymill` if it is None, of the cluster in the kubeconfig's current context,
    or of this pod's. Raises `ClusterError` where no Kubernetes is configured."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace or "raymill"
        try:
            path = os.environ.get("KUBECONFIG")  # which the client reads only once
            config.load_kube_config(config_file=path) if path else config.load_config()
        except config.ConfigException as error:
            raise ClusterError(
                f"no Kubernetes is configured ({error}): set KUBECONFIG, or run this in a pod"
            ) from None
        # What is tried again is no news
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        configuration = Configuration.get_default_copy()
        configuration.retries = _RETRIES
        self._client = ApiClient(configuration)
        self._kinds: dict[str, dict[str, Object]] = {}
        self._timeout_s = _TIMEOUT_S
        self._has_said = False

    def all(self, api_version: str, kind: str, *, selector: str = "") -> list[Object]:
        """Returns the namespace's objects of a kind, with the labels of `selector`; none if the
        kind is unknown."""
        query = [("labelSelector", selector)] if selector else []
        found = self._ask(
            "GET", _path(api_version, kind, self.namespace), query=query, missing_is_none=True
        )
        items = found["items"] if found else []
        # A list's items do not say it
        return [{"apiVersion": api_version, "kind": kind} | item for item in items]

    def get(self, api_version: str, kind: str, name: str) -> Object | None:
        path = f"{_path(api_version, kind, self.namespace)}/{name}"
        return self._ask("GET", path, missing_is_none=True)

    def patch(self, manifest: Object, patch: Patch) -> None:
        """Patches the object. Raises `ClusterError` if it has changed so that the patch does not
        fit."""
        query = [("fieldManager", FIELD_MANAGER)]
        path = self._path_of(manifest)
        self._ask(
            "PATCH", path, query=query, body=patch, content_type="application/json-patch+json"
        )

    def nodes(self) -> list[Object]:
        """Returns the nodes of the cluster."""
        listed: list[Object] = self._ask("GET", _path("v1", "Node", None))["items"]
        return listed

    def change_node(
        self, name: str, change: Callable[[Object], Patch], *, of_status: bool = False
    ) -> None:
        """Patches a node, or its status, by what `change` makes of it, anew when somebody has
        written it meanwhile."""
        path = f"{_path('v1', 'Node', None)}/{name}"
        target = f"{path}/status" if of_status else path
        query, content_type = [("fieldManager", FIELD_MANAGER)], "application/json-patch+json"
        for tries_left in reversed(range(_TRIES)):
            patch = change(self._ask("GET", path))
            if not patch:
                return
            try:
                self._ask("PATCH", target, query=query, body=patch, content_type=content_type)
                return
            except _KubeRefusedError as error:
                if error.status not in (409, 422) or not tries_left:
                    raise

    def apply(self, manifest: Object, *, dry_run: bool = False, force: bool = False) -> Object:
        """Applies on the server's side, and returns the resulting object. Raises `ClusterError` if
        another field manager owns what would change, unless `force` takes it."""
        query = [("fieldManager", FIELD_MANAGER)]
        query += [("dryRun", "All")] * dry_run + [("force", "true")] * force
        kind, path, metadata = (
            "application/apply-patch+yaml",
            self._path_of(manifest),
            manifest["metadata"],
        )
        if "namespace" in metadata and "/namespaces/" not in path:
            plain = {key: value for key, value in metadata.items() if key != "namespace"}
            manifest = manifest | {"metadata": plain}
        return self._ask("PATCH", path, query=query, body=manifest, content_type=kind)

    def create(self, manifest: Object) -> None:
        """Creates the object unless there is one of the name, which is left as it is."""
        collection = self._path_of(manifest).rpartition("/")[0]
        try:
            self._ask("POST", collection, query=[("fieldManager", FIELD_MANAGER)], body=manifest)
        except _KubeRefusedError as error:
            if error.status != 409:
                raise

    def apply_all(self, manifests: list[Object], *, dry_run: bool = False) -> dict[str, Any]:
        """Applies each object, whether or not others are refused. Returns which were applied, what
        was kept as it ran, which failed and why, which were not tried once Kubernetes did not
        answer, and, for a dry run, which cannot be checked before their namespace exists."""
        applied: list[str] = []
        result: dict[str, Any] = {"checked" if dry_run else "applied": applied}
        for index, manifest in enumerate(manifests):
            name = full_name(manifest)
            try:
                kept = self._apply_as_it_runs(manifest, dry_run=dry_run)
            except _KubeRefusedError as error:
                if dry_run and error.lacks_namespace:
                    result.setdefault("not_checked", []).append(name)
                else:
                    result.setdefault("failed", {})[name] = str(error)
                if error.status == 403 and component_of(manifest) == "platform":
                    result["note"] = "an administrator applies the component `platform`"
                continue
            except ClusterError as error:  # the rest would fail likewise, after as long a time each
                result.setdefault("failed", {})[name] = str(error)
                if rest := [full_name(other) for other in manifests[index + 1 :]]:
                    result["not_tried"] = rest
                break
            applied.append(name)
            if kept:
                result.setdefault("kept", {})[name] = kept
        return result

    def _apply_as_it_runs(self, manifest: Object, *, dry_run: bool) -> list[str]:
        """Applies one object with what `as_applied` keeps, and returns lines that say what that is.

        Ray's kinds are applied by force: a list of worker groups has one owner, and KubeRay and the
        autoscaler write it too. So what is theirs is read from the object first, and its version
        shows whether they wrote since. Of the other kinds only what `kubectl apply` owned is taken;
        what a person edited is refused.
        """
        is_rays, kept = manifest["kind"] in KINDS, list[str]()
        for tries_left in reversed(range(_TRIES)):
            wanted = manifest
            if is_rays:
                live = self._ask("GET", self._path_of(manifest), missing_is_none=True)
                wanted, kept = as_applied(manifest, live)
            try:
                made = self.apply(wanted, dry_run=dry_run, force=is_rays)
            except _KubeRefusedError as error:
                if error.status != 409 or not tries_left:
                    raise
                if not is_rays and self._resolve(error, manifest, dry_run=dry_run):
                    return kept
                continue
            # What kubectl owned beside us stays although the manifest no longer has it, unless it
            # is taken over.
            if dry_run or not self._take_over(made):
                return kept
        raise ClusterError(
            f"{full_name(manifest)} was changed by others again and again: apply it again"
        )

    def _resolve(self, conflict: "_KubeRefusedError", manifest: Object, *, dry_run: bool) -> bool:
        """Takes over what `kubectl apply` owns, for another try, or raises the conflict if it owns
        no part of it. A dry run checks here what that try would do, and returns True."""
        live = (
            self._ask("GET", self._path_of(manifest)) if conflict.owners & KUBECTL_APPLY else None
        )
        if live is None or taken_over(live, FIELD_MANAGER) is None:
            raise conflict
        if not dry_run:
            return not self._take_over(live)
        if not conflict.owners <= KUBECTL_APPLY:
            raise conflict
        self.apply(manifest, dry_run=True, force=True)
        return True

    def _take_over(self, live: Object) -> bool:
        """Takes over what `kubectl apply` owns of the object, if that is anything."""
        patch = taken_over(live, FIELD_MANAGER)
        if patch is None:
            return False
        try:
            self.patch(live, patch)
        except _KubeRefusedError as error:
            if error.status != 409:  # it was changed meanwhile, and is read again
                raise
        return True

    def delete(self, api_version: str, kind: str, name: str) -> None:
        """Deletes the object if it exists."""
        self._ask(
            "DELETE", f"{_path(api_version, kind, self.namespace)}/{name}", missing_is_none=True
        )

    def _path_of(self, manifest: Object) -> str:
        """Returns the object's path. A kind of cluster scope has no namespace in it, whatever the
        manifest says: to kustomize, which writes namespaces, every kind that is not Kubernetes' own
        looks like one with a namespace."""
        api_version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        namespace = metadata.get("namespace")
        if namespace is None or kind in KINDS:
            return f"{_path(api_version, kind, namespace)}/{metadata['name']}"
        known = self._known_kinds(api_version).get(kind, {"namespaced": True})
        return f"{_path(api_version, kind, namespace if known['namespaced'] else None)}/{metadata['name']}"

    def _known_kinds(self, api_version: str) -> dict[str, Object]:
        """Returns what the API says of each kind of a group's version: none if the group is not
        installed."""
        if api_version not in self._kinds:
            listed = self._ask("GET", _root(api_version), missing_is_none=True)
            resources = (listed or {}).get("resources", [])
            self._kinds[api_version] = {
                item["kind"]: item for item in resources if "/" not in item["name"]
            }
        return self._kinds[api_version]

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
            with self._heard():
                return self._client.call_api(
                    path,
                    method,
                    query_params=query or [],
                    header_params={"Accept": "application/json", "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                    response_types_map={200: "object", 201: "object"},
                    _return_http_data_only=True,
                    _request_timeout=self._timeout_s,
                )
        except ApiException as error:
            if error.status == 404 and missing_is_none:
                return None
            if error.status == 401:
                raise ClusterError(
                    "Kubernetes does not know who you are: log in again, for a valid token"
                ) from None
            raise _KubeRefusedError(error, method, path) from None
        except HTTPError as error:
            self._timeout_s = _SHORT_TIMEOUT_S
            host = self._client.configuration.host
            raise ClusterError(
                f"no Kubernetes API answers at {host}: {str(error).splitlines()[0][:300]}"
            ) from None

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Says once, and while it is waited for, that Kubernetes does not answer."""
        timer = threading.Timer(_SAYS_AFTER_S, self._say_silent)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say_silent(self) -> None:
        if not self._has_said:
            self._has_said = True
            host = self._client.configuration.host
            say(f"Kubernetes at {host} has not answered for {_SAYS_AFTER_S} s; still waiting")


_OWNER = re.compile('conflict with "([^"]+)"')
_OPERATORS_RIGHTS = {
    "rayclusters": ("GET", "POST", "PATCH"),
    "rayjobs": ("GET", "POST", "PATCH", "DELETE"),
    "rayservices": ("GET", "POST", "PATCH"),
    "configmaps": ("POST", "PATCH"),
    "pods": ("GET",),
    "events": ("GET",),
}
"""Methods by kind, as k8s/base/rbac.yaml has them."""


class _KubeRefusedError(ClusterError):
    """Kubernetes refused a request."""

    def __init__(self, error: ApiException, method: str, path: str) -> None:
        self.status = error.status
        try:
            said = json.loads(error.body or "{}")
        except json.JSONDecodeError:  # plain text for a kind that is not installed
            said = {}
        details = said.get("details") or {}
        self.lacks_namespace = error.status == 404 and details.get("kind") == "namespaces"
        named = [_OWNER.search(cause.get("message", "")) for cause in details.get("causes") or []]
        self.owners = {match[1] for match in named if match}
        """Field managers with which an apply conflicts."""
        super().__init__(
            self._words(said, method, path) or f"Kubernetes refused {method} {path}: {error.reason}"
        )

    def _words(self, said: Object, method: str, path: str) -> str:
        what = path.rsplit("/namespaces/", maxsplit=1)[-1]
        message = said.get("message", "")
        if self.status == 403 and "exceeded quota" not in message:
            return f"you may not {method} {what}: {_who_may(method, what)} ({message})"
        if self.lacks_namespace:
            return f"{what}: the namespace is not there: apply the component `platform` first"
        if self.status == 404 and (
            not message or "could not find the requested resource" in message
        ):
            return f"{what}: its kind is not installed: apply KubeRay's operator, or Kueue, first"
        if self.status == 404:
            return f"there is no {what}"
        if self.status == 409:
            advice = ": change it where that one has it from" if self.owners else ""
            return f"another field manager owns a part of {what}: {message}{advice}"
        return (
            f"Kubernetes refused {method} {what} with {self.status}: {message}" if message else ""
        )


def _who_may(method: str, what: str) -> str:
    """Says who may do what was refused, by its path, without `namespaces` if it has that."""
    kinds = what.split("/")
    if kinds[1:2] and method in _OPERATORS_RIGHTS.get(kinds[1], ()):
        return "k8s/base/rbac.yaml gives the group raymill-operators that right"
    if kinds[:4] == ["", "api", "v1", "nodes"]:
        return "k8s/components/node-marks gives the group raymill-operators that right"
    return "only an administrator may"


def _path(api_version: str, kind: str, namespace: str | None) -> str:
    """Returns the path of a kind's objects by the rule that Kubernetes' kinds follow: policies,
    classes."""
    plural = re.sub(r"s$", "se", re.sub(r"(?<![aeiou])y$", "ie", kind.lower())) + "s"
    return (
        f"{_root(api_version)}/namespaces/{namespace}/{plural}"
        if namespace
        else f"{_root(api_version)}/{plural}"
    )


def _root(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
