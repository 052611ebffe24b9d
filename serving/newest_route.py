"""In each proxy: the newest route that an answer came by goes along with every later request, so that no client sees a
new version from one replica and afterwards the old one from another, which has not heard of the switch yet."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.promotion import ROUTE_HEADER, Route

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
