"""The version that one request is given, from the moment when it is known who asks until the answer has gone out.

In each proxy the newest route that an answer came by goes along with every later request, so that no client sees a
new version from one replica and afterwards the old one from another, which has not heard of the switch yet.
"""

from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.promotion import ROUTE_HEADER, Route
from serving.delivery.versions import Versions
from serving.protocol.errors import model_not_found

SESSION_HEADER = b"x-session-id"
_SCOPE_KEY = "raymill.routed"


class RoutedRequest:
    """Holds its version: an engine that is not needed any more ends after the last of those who hold it."""

    def __init__(self, versions: Versions, headers: list[tuple[bytes, bytes]]) -> None:
        self._versions = versions
        self._sessions = [value.decode("latin-1") for name, value in headers if name == SESSION_HEADER]
        self._held: LoadedVersion | None = None
        self._is_second_try = False
        self.key: str | None = None  # hash of the API key
        for name, value in headers:
            if name == ROUTE_HEADER.encode() and (route := Route.from_header(value.decode("latin-1"))):
                versions.learn(route)

    @classmethod
    def of(cls, request: Request) -> "RoutedRequest":
        routed = request.scope[_SCOPE_KEY]
        assert isinstance(routed, cls)
        return routed

    def put_into(self, scope: MutableMapping[str, Any]) -> None:
        scope[_SCOPE_KEY] = self

    def take(self, model: str | None = None, *, user: str | None = None) -> LoadedVersion:
        """The version that answers the request, which asks for `model` if it names one, by whatever name it was served
        here. While a canary is on it is
        the one of the API key; else of `user`, of the session header, or any. Raises `ApiError` (404)."""
        if model is not None and model not in (names := self._versions.names):
            raise model_not_found(model, served=names[0])
        self._hold(self._versions.pick(self.key or user or next(iter(self._sessions), None)))
        assert self._held is not None
        return self._held

    def take_other(self) -> LoadedVersion | None:
        """In place of the version that failed, once; None where there is no other."""
        assert self._held is not None
        other = None if self._is_second_try else self._versions.other_than(self._held)
        if other is not None:
            self._is_second_try = True
            self._hold(other)
        return other

    def card(self) -> dict[str, Any]:
        """The model as its entry under /v1/models, with the versions that are about."""
        state = self._versions.delivery
        about = {"live": state.live, "candidate": state.candidate, "previous": state.previous}
        shown = {role: found and found.model_dump(include={"version", "lineage"}) for role, found in about.items()}
        return self.take().model.card() | {"delivery": {"phase": state.phase, **shown}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer. The route may be newer than the one that was taken, never older."""
        held = self._held or self._versions.live
        return {"x-model-version": held.model.version, ROUTE_HEADER: self._versions.route.to_header()}

    def close(self) -> None:
        self._hold(None)

    def _hold(self, version: LoadedVersion | None) -> None:
        if self._held is not None:
            self._held.open_requests -= 1
        self._held = version
        if version is not None:
            version.open_requests += 1


_NAME = ROUTE_HEADER.encode()


class NewestRoute:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._newest = Route(epoch=0, primary=0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def learn(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in message["headers"]:
                    route = Route.from_header(value.decode("latin-1")) if name == _NAME else None
                    if route is not None and route.epoch > self._newest.epoch:
                        self._newest = route
            await send(message)

        headers = [header for header in scope["headers"] if header[0] != _NAME]  # a client may not choose
        headers.append((_NAME, self._newest.to_header().encode()))
        await self._app({**scope, "headers": headers}, receive, learn)
