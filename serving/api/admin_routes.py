"""The routes of operators: /admin/promote, /finish, /rollback and /drain, which the audit log
records, and /status and /audit."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import LATEST, find_checkpoint
from cluster.storage.uris import StorageError, absolute_uri
from model.text.tokenizer import PLAIN_ENCODING
from raymill.errors import UserError
from serving.api.route_facts import Opens, RouteFacts, declares
from serving.delivery.audit_log import AuditLog
from serving.delivery.follower import CoordinatorAwayError, Follower, answer_of
from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.promotion import MODEL, Delivery, DeliveryError, Terms, Version, version_of
from serving.delivery.routed_request import RoutedRequest
from serving.protocol.errors import ApiError, error_of
from serving.protocol.protocol import read_request
from serving.protocol.request import Request as Body
from serving.protocol.request_facts import timestamp
from serving.protocol.served_model import misfit, read_served_model
from serving.text.chat_misfit import chat_misfit
from serving.text.reader import open_reader

_ORDER = RouteFacts(Opens.TO_ADMINS, is_metered=False)
SHOWN = {"version", "checkpoint"}  # of a version, in the audit log
# Every replica measures them on both versions, beside its clients' requests
MAX_GATE_TOKENS = 16_384

Row = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]


class Order(Body):
    """The body of an order for one adapter, or without a name for the model itself."""

    adapter: str | None = Field(None, min_length=1)

    @property
    def line(self) -> str:
        return self.adapter or MODEL


class PromoteRequest(Order):
    """The body of POST /admin/promote. Missing fields are as in the endpoint's settings under
    `delivery`."""

    checkpoint: str = Field(min_length=1)
    canary_percent: float | None = Field(None, ge=0, le=100)
    watch_s: float | None = Field(None, ge=0)
    max_loss_increase: float | None = Field(None, ge=0)
    gate_rows: list[Row] = Field(default_factory=list)  # of token ids
    gate_text: str = ""


class RollbackRequest(Order):
    reason: str = Field("an operator asked for it", max_length=200)


class DrainRequest(Body):
    drain: bool = True


def add_admin_routes(app: FastAPI, follower: Follower) -> None:
    coordinator = follower.coordinator
    audit = AuditLog(follower.config)
    obey = partial(_obey, follower, audit)

    @app.post("/admin/promote", status_code=202)
    @declares(_ORDER)
    async def promote(request: Request) -> dict[str, Any]:
        """Answers once the promotion has begun; /admin/status reports its progress."""
        asked = await read_request(request, PromoteRequest)
        return await obey(request, "promote", asked, _promoted(follower, asked), asked.line)

    @app.post("/admin/finish")
    @declares(_ORDER)
    async def finish(request: Request) -> dict[str, Any]:
        asked = await read_request(request, Order)
        result = _asked(coordinator.finish.remote(asked.line))
        return await obey(request, "finish", asked, result, asked.line)

    @app.post("/admin/rollback")
    @declares(_ORDER)
    async def rollback(request: Request) -> dict[str, Any]:
        asked = await read_request(request, RollbackRequest)
        result = _asked(coordinator.roll_back.remote(asked.reason, asked.line))
        return await obey(request, "rollback", asked, result, asked.line)

    @app.post("/admin/drain")
    @declares(_ORDER)
    async def drain(request: Request) -> dict[str, Any]:
        """Makes every replica refuse new completions and finish the running ones, until it is
        called with `{"drain": false}`."""
        asked = await read_request(request, DrainRequest)
        return await obey(request, "drain", asked, _asked(coordinator.drain.remote(asked.drain)))

    @app.get("/admin/status")
    @declares(_ORDER)
    async def status() -> dict[str, Any]:
        return dict(await _asked(coordinator.status.remote()))

    @app.get("/admin/audit")
    @declares(_ORDER)
    async def orders() -> dict[str, Any]:
        """Returns the orders so far, the oldest first."""
        try:
            return {"orders": await asyncio.to_thread(audit.read)}
        except StorageError as error:
            raise error_of("storage", problem=error) from None


async def _obey(
    follower: Follower,
    audit: AuditLog,
    request: Request,
    order: str,
    asked: Body,
    result: Awaitable[Delivery],
    line: str = MODEL,
) -> dict[str, Any]:
    """Returns the endpoint's state after an order, which is in the audit log then, also if it was
    refused."""
    before = follower.versions.delivery.lines.get(line)
    hidden = {"gate_rows", "gate_text"} | (set() if line else {"adapter"})
    entry = {
        "time": timestamp(time.time()),
        "key": RoutedRequest.of(request).facts.key,
        "request_id": request.headers.get("x-request-id"),
        "order": order,
        "asked": asked.model_dump(exclude=hidden),
        "old": before and before.live.model_dump(include=SHOWN),
        "new": None,
        "result": "internal_error",
    }
    try:
        after = await result
        new = after.line(line).candidate or after.line(line).live
        entry |= {"new": new.model_dump(include=SHOWN), "result": "obeyed"}
        return after.shown()
    except ApiError as error:
        entry["result"] = f"{error.code}: {error.message}"
        raise
    finally:
        await asyncio.to_thread(audit.add, entry)


async def _promoted(follower: Follower, asked: PromoteRequest) -> Delivery:
    """Returns the endpoint's state once the promotion has begun."""
    config, versions = follower.config, follower.versions
    try:
        versions.delivery.line(asked.line)
    except DeliveryError as error:
        raise _conflict(error) from None
    live = versions.line_of(asked.adapter).live
    candidate = await _read_candidate(asked.checkpoint, live, config)
    gate_rows = await rows_of_gate(asked, live)
    given = asked.model_dump(
        include={"canary_percent", "watch_s", "max_loss_increase"}, exclude_none=True
    )
    rules = config.delivery.model_dump(exclude={"endpoint", "weights", "allowed_checkpoints"})
    terms = Terms(**rules | given | {"gate_rows": gate_rows})
    return await _asked(follower.coordinator.promote.remote(candidate, terms, asked.line))


async def _read_candidate(reference: str, live: LoadedVersion, config: ServeConfig) -> Version:
    """Reads the candidate, and writes a few conversations by its chat template. Raises `ApiError`
    (400) for what cannot replace the live version."""
    if not is_allowed(reference, config.delivery.allowed_checkpoints):
        message = (
            f"{reference[:200]!a} is not under any of delivery.allowed_checkpoints of this endpoint"
        )
        raise ApiError(message, param="checkpoint", code="checkpoint_refused")
    try:
        uri, folder = await asyncio.to_thread(
            find_checkpoint, reference, config.storage.uri, signed_by=config.storage.signer
        )
        texts = await open_reader(folder)  # first: it bounds what a stranger's tokenizer does
        texts.close()
        limit = config.engine.max_context
        model = await asyncio.to_thread(
            read_served_model, folder, name=live.model.name, max_context=limit
        )
    except UserError as error:
        message = str(error)
    # The last ones come from a foreign config.json
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{reference} is not a checkpoint: {error!r}"
    else:
        problem = misfit(live.model, model) or chat_misfit(live.texts.probe, texts.probe)
        if not problem:
            return version_of(model, checkpoint=uri)
        message = f"checkpoint {uri} {problem}"
    raise ApiError(message, param="checkpoint", code="checkpoint_refused")


def is_allowed(reference: str, allowed: Sequence[str]) -> bool:
    """Tells whether a checkpoint lies under one of these places; any does without them. Nothing is
    looked up for it: an order must not make the server read what it may not promote."""
    if not allowed or reference == LATEST:
        return True
    if ".." in reference.split("/"):
        return False
    place = _place(reference)
    return any(place.startswith(_place(prefix)) for prefix in allowed)


def _place(uri: str) -> str:
    return (uri if "://" in uri else absolute_uri(uri)).rstrip("/") + "/"


async def rows_of_gate(
    asked: PromoteRequest, version: LoadedVersion
) -> tuple[tuple[int, ...], ...]:
    """Returns the token rows of the gate, none longer than the live version's engine reads. Raises
    `ApiError` (400) for what the model cannot read."""
    live = version.model
    longest = live.config.n_positions - version.engine.facts.least_tokens
    rows = asked.gate_rows
    if asked.gate_text:
        live.require_tokenizer()
        [text] = await version.texts.encoded([asked.gate_text], PLAIN_ENCODING)
        whole = live.require_tokenizer().encode_whole(text) if isinstance(text, str) else text
        token_ids = whole[:MAX_GATE_TOKENS]
        starts = range(0, len(token_ids) - 1, longest)
        rows = [*rows, *(token_ids[start : start + longest] for start in starts)]
    num_tokens = sum(map(len, rows))
    if num_tokens > MAX_GATE_TOKENS:
        raise ApiError(
            f"gate_rows: {num_tokens} tokens, at most {MAX_GATE_TOKENS} are measured",
            param="gate_rows",
        )
    cut = [live.checked_ids(row[:longest], param="gate_rows") for row in rows]
    return tuple(tuple(row) for row in cut if len(row) > 1)


async def _asked(call: Any) -> Any:
    try:
        return await answer_of(call)
    except DeliveryError as error:
        raise _conflict(error) from None
    except CoordinatorAwayError:
        raise error_of("coordinator_unavailable") from None


def _conflict(error: DeliveryError) -> ApiError:
    return ApiError(str(error), status=409, code="delivery_conflict")
