"""The routes that show how a model reads: /tokenize and /detokenize."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from model.files.bounded_text import TextError
from serving.api.route_facts import Opens, RouteFacts, declares
from serving.delivery.routed_request import RoutedRequest
from serving.protocol.errors import ApiError, overloaded
from serving.protocol.protocol import DetokenizeRequest, TokenizeRequest, read_request
from serving.protocol.served_model import ServedModel

_TOKENS = RouteFacts(Opens.TO_USERS, is_metered=True)


def add_tool_routes(app: FastAPI, *, max_waiting: int) -> None:
    thread, num_waiting = ThreadPoolExecutor(1, thread_name_prefix="tools"), 0

    async def in_turn(work: Callable[[], dict[str, Any]]) -> Response:
        """Answers with the result of `work`, which turns text into tokens or back in one thread, in
        order of arrival. A megabyte takes half a second: in the event loop every stream of the
        replica would wait for it, and many threads would take the engine's processors. Raises
        `ApiError`: 429 if too many wait already, and what `work` raises."""
        nonlocal num_waiting
        if num_waiting >= max_waiting:
            raise overloaded(
                f"The replica has {max_waiting} texts to turn into tokens or back; try again later"
            )
        num_waiting += 1
        try:
            content = await asyncio.get_running_loop().run_in_executor(
                thread, lambda: orjson.dumps(work())
            )
        finally:
            num_waiting -= 1
        return Response(content, media_type="application/json")

    @app.post("/tokenize")
    @declares(_TOKENS)
    async def tokenize(request: Request) -> Response:
        parsed = await read_request(request, TokenizeRequest)
        version = RoutedRequest.of(request).take(parsed.model)
        version.model.require_tokenizer()
        try:
            [text] = await version.texts.encoded([parsed.prompt], parsed.encoding)
        except TextError as error:
            raise ApiError(str(error), param="prompt", code="invalid_value") from None
        return await in_turn(lambda: _tokenized(parsed, text, version.model))

    @app.post("/detokenize")
    @declares(_TOKENS)
    async def detokenize(request: Request) -> Response:
        parsed = await read_request(request, DetokenizeRequest)
        model = RoutedRequest.of(request).take(parsed.model).model
        return await in_turn(lambda: _detokenized(parsed, model))


def _tokenized(
    request: TokenizeRequest, text: str | list[int], model: ServedModel
) -> dict[str, Any]:
    """Returns the answer, of a text that may be tokens already."""
    tokenizer = model.require_tokenizer()
    tokens = tokenizer.encode_prompt(text, request.encoding) if isinstance(text, str) else text
    names = (
        [model.token_name(token_id) for token_id in tokens] if request.return_token_strs else None
    )
    return {
        "count": len(tokens),
        "max_model_len": model.config.n_positions,
        "tokens": tokens,
        "token_strs": names,
    }


def _detokenized(request: DetokenizeRequest, model: ServedModel) -> dict[str, Any]:
    model.require_tokenizer()
    pieces: list[bytes] = []
    is_first = True
    for token_id in model.checked_ids(request.tokens, param="tokens"):
        pieces.append(model.token_bytes(token_id, is_first=is_first))
        is_first = is_first and not model.has_text([token_id])
    return {"prompt": b"".join(pieces).decode("utf-8", errors="replace")}
