"""The routes of the Responses API."""

import asyncio
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serving.api.asked_routes import AskedRoutes
from serving.api.ingress import CompletionService
from serving.api.route_facts import OTHER, Opens, RouteFacts, declares
from serving.protocol.errors import ApiError, error_of
from serving.protocol.protocol import PARSED_AT_ONCE_BYTES, read_request
from serving.proxy.exchange import RESPONSES_PATH
from serving.responses.answer import ResponseAnswer
from serving.responses.request import ResponseRequest, as_chat
from serving.responses.words import in_words_of_responses


def add_response_routes(app: FastAPI, asked: AskedRoutes, service: CompletionService) -> None:
    """Adds the route that answers as a chat does, and the routes of stored responses, which are
    refused."""

    async def respond(request: Request) -> Response:
        parsed = await read_request(request, ResponseRequest)
        is_small = len(await request.body()) <= PARSED_AT_ONCE_BYTES
        try:
            chat = as_chat(parsed) if is_small else await asyncio.to_thread(as_chat, parsed)
            shape = partial(ResponseAnswer, request=parsed, **chat.reading)
            return await service.answer_chat(chat, shape, request)
        except ApiError as error:
            raise in_words_of_responses(error) from None

    asked.add(RESPONSES_PATH, respond, RouteFacts(Opens.TO_USERS, is_metered=True))

    @app.api_route(f"{RESPONSES_PATH}/{{name:path}}", methods=["GET", "POST", "DELETE"])
    @declares(OTHER)
    async def stored_response(request: Request) -> Response:
        raise error_of("no_stored_response", path=request.url.path[:96])
