"""Holds the version of one request, from the check of its key until the answer has gone out.

Each proxy sends the newest route that it has seen in an answer along with every later request, so
that no client sees a new version from one replica and then the old one from another, which has not
heard of the switch yet.
"""

from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.named_version import read_asked_model
from serving.delivery.route import ROUTE_HEADER, Route
from serving.delivery.versions import Versions
from serving.protocol.errors import error_of
from serving.protocol.request_facts import RequestFacts

# From the front door: a replica has ended while it worked on this request
RETRY_HEADER = b"x-raymill-retry"
_SCOPE_KEY = "raymill.routed"
_ROUTE_NAME = ROUTE_HEADER.encode()
_MAX_ORIGINS = 64  # of the model and of each adapter, also of an endpoint that was replaced


class RoutedRequest:
    """One request and the version that it holds. An unneeded engine ends after the last request
    that holds it."""

    def __init__(self, versions: Versions, scope: Scope) -> None:
        """Puts itself into the scope, where `of` finds it."""
        scope[_SCOPE_KEY] = self
        headers = dict(reversed(scope["headers"]))  # of several alike the first
        self._versions = versions
        session = headers.get(b"x-session-id")
        self._session = None if session is None else session.decode("latin-1")
        self._line = versions  # of the version that is held
        self._held: LoadedVersion | None = None
        self._is_second_try = RETRY_HEADER in headers
        self.key: str | None = None  # hash of the API key
        self.may_name_versions = False
        self.facts = RequestFacts()
        for route in _routes_in(scope["headers"]):
            versions.learn(route)

    @classmethod
    def of(cls, request: Request) -> "RoutedRequest":
        routed = request.scope[_SCOPE_KEY]
        assert isinstance(routed, cls)
        return routed

    def take(self, model: str | None = None, *, user: str | None = None) -> LoadedVersion:
        """Returns the version that answers the request. `model` may be an adapter's name, or any
        under which a version was served here. During a canary the version depends on the API key,
        or else on `user` or the session header, unless `model` names one (`NAME@VERSION`). Raises
        `ApiError` (403, 404)."""
        names = self._versions.names
        asked = read_asked_model(model, [*names, *self._versions.adapters])
        line = self._versions.line_of(asked.name)
        if line is self._versions and asked.name is not None and asked.name not in names:
            raise error_of("model_not_found", param="model", name=asked.name[:64], served=names[0])
        self._line = line
        if asked.version is None:
            self._hold(line.pick(self.key or user or self._session))
        else:
            self._hold(self._named(asked.version, line))
            self._is_second_try = True  # no other version was asked for
        assert self._held is not None
        return self._held

    def _named(self, version: str, line: Versions) -> LoadedVersion:
        """Returns the version of that hash. Raises `ApiError`: 403 without the right to name one,
        404 if it does not answer clients."""
        if not self.may_name_versions:
            raise error_of("version_closed", param="model")
        known = line.by_hash
        if version not in known:
            served = ", ".join(known)
            raise error_of("version_not_found", param="model", version=version[:64], served=served)
        return known[version]

    def take_other(self) -> LoadedVersion | None:
        """Returns another version after one has failed, once; None if there is no other."""
        assert self._held is not None
        other = None if self._is_second_try else self._line.other_than(self._held)
        if other is not None:
            self._is_second_try = True
            self._hold(other)
        return other

    @property
    def withdrawn(self) -> frozenset[str]:
        """The weights that were refused or rolled back, see `Delivery`."""
        return self._line.delivery.withdrawn

    def card(self, model: str | None = None) -> dict[str, Any]:
        """Returns the entry under /v1/models of a name, or of the model itself, with the versions
        that are loaded or in question. Raises `ApiError` (404)."""
        shown = self.take(model).model.card()
        if self._line is not self._versions:
            shown["parent"] = self._versions.names[0]
        state = self._line.delivery
        about = {"live": state.live, "candidate": state.candidate, "previous": state.previous}
        versions = {
            role: version and version.model_dump(include={"version", "lineage"})
            for role, version in about.items()
        }
        return shown | {"delivery": {"phase": state.phase, **versions}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer. The route may be newer than the one that was taken, never
        older."""
        held = self._held or self._versions.live
        return {
            "x-model-version": held.model.version,
            ROUTE_HEADER: self._line.route.to_header(),
        }

    def cards(self) -> list[dict[str, Any]]:
        """Returns the entries under /v1/models: of the model, and of the adapters beside it."""
        versions = self._versions
        here = [name for name, line in versions.adapters.items() if versions.line_of(name) is line]
        adapters = [self.card(name) for name in here]
        return [self.card(), *adapters]

    def close(self) -> None:
        self._hold(None)

    def _hold(self, version: LoadedVersion | None) -> None:
        if self._held is not None:
            self._held.open_requests -= 1
        self._held = version
        if version is not None:
            version.open_requests += 1
            self.facts.model_version = version.model.version


class NewestRoutes:
    """The newest routes that a proxy has seen in answers: one of each origin, as each adapter has
    its own, and an endpoint that is redeployed begins anew while replicas of the old one still
    answer."""

    def __init__(self) -> None:
        # By origin; the one that was added last is the youngest
        self._newest: dict[str, Route] = {}
        self.headers: list[tuple[bytes, bytes]] = []  # of a request to a replica

    def learn(self, headers: list[tuple[bytes, bytes]]) -> None:
        for route in _routes_in([pair for pair in headers if pair not in self.headers]):
            known = self._newest.get(route.origin)
            if known is not None and not route.is_newer_than(known):
                continue
            self._newest[route.origin] = route
            if len(self._newest) > _MAX_ORIGINS:
                del self._newest[next(iter(self._newest))]
            self.headers = [
                (_ROUTE_NAME, route.to_header().encode()) for route in self._newest.values()
            ]


def _routes_in(headers: list[tuple[bytes, bytes]]) -> list[Route]:
    texts = [value.decode("latin-1") for name, value in headers if name == _ROUTE_NAME]
    return [route for text in texts if (route := Route.from_header(text)) is not None]
