"""Traces a text to what the served checkpoint was trained on: the request, its limits, and the
process beside the replica that computes the answer.

The index is of the jobs, and serving stands beside them, so a process of theirs
(`jobs.trace.run_traces`) reads it. It starts with the first request, at low priority, maps the
index's files (the pages are in memory only once, for all replicas of a node), and ends after some
idle time.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Annotated, Any, Self

import orjson
from pydantic import Field, model_validator

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import metadata_of, named_checkpoint
from model.files.checkpoint_folder import Metadata
from raymill.errors import UserError
from serving.protocol.errors import ApiError, error_of, overloaded
from serving.protocol.protocol import Request
from serving.protocol.served_model import ServedModel
from serving.xray.asked_process import AskedProcess

MODULE = "jobs.trace.run_traces"
MAX_TEXT_CHARS = 65_536
MIN_SPAN_TOKENS = 12  # the shortest that the index surely finds
MAX_DOCUMENTS = 50
MAX_CONTEXT_TOKENS = 512
MAX_WAITING = 8  # requests, beside the one that is answered
TIMEOUT_S = 30.0
LIMITS = {"max_tokens": 8192, "max_listed": 500, "max_steps": 64}
"""How much an answer may take: tokens of a text, places that are listed with their documents in all
its spans together, and steps that are listed of a place."""


class TraceRequest(Request):
    """The body of POST /v1/trace: a text, or the token ids of one."""

    model: str
    text: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] | None = None
    tokens: Annotated[list[int], Field(max_length=LIMITS["max_tokens"])] | None = None
    min_tokens: int = Field(MIN_SPAN_TOKENS, ge=MIN_SPAN_TOKENS, le=LIMITS["max_tokens"])
    documents: int = Field(5, ge=1, le=MAX_DOCUMENTS)
    context_tokens: int = Field(48, ge=0, le=MAX_CONTEXT_TOKENS)

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("expected either text or tokens")
        return self


def card() -> dict[str, Any]:
    """Returns the limits of a request."""
    return {
        "max_text_chars": MAX_TEXT_CHARS,
        "max_tokens": LIMITS["max_tokens"],
        "min_span_tokens": MIN_SPAN_TOKENS,
        "max_documents": MAX_DOCUMENTS,
        "max_context_tokens": MAX_CONTEXT_TOKENS,
    }


@dataclass(frozen=True)
class Traced:
    """A checkpoint, and the index of its training tokens."""

    checkpoint: str  # URI
    metadata: Metadata
    index: str
    storage: str

    def arguments(self) -> dict[str, Any]:
        """Returns what the process is told."""
        facts = ("run_id", "step", "data_manifest_hash", "data_identity")
        checkpoint = {name: getattr(self.metadata, name) for name in facts}
        return {
            "checkpoint": {"uri": self.checkpoint} | checkpoint,
            "limits": LIMITS,
            "store": self.index,
            "storage": self.storage,
            "threads": 1,
        }


def require_traced(config: ServeConfig) -> None:
    """Raises `UserError` for an index that is not there, or of another store than the checkpoint
    was trained on. Reads no weights."""
    if config.trace is None:
        return
    checkpoint = named_checkpoint(config.checkpoint, config.storage.uri)
    metadata = metadata_of(checkpoint)
    if metadata is None:
        raise UserError(
            f"trace: {checkpoint} does not say what it was trained on, so no text can be traced for it; serve one of "
            "raymill's own checkpoints, or leave trace out"
        )
    traced = Traced(checkpoint, metadata, config.trace, config.storage.uri)
    asyncio.run(_require(VersionTrace(traced)))


async def _require(trace: "VersionTrace") -> None:
    try:
        await trace.check()
    except ApiError as error:
        raise UserError(f"trace: {error}") from None
    finally:
        trace.close()


class VersionTrace:
    """One version's process. It answers one request at a time, and some wait."""

    def __init__(self, traced: Traced) -> None:
        self._process = AskedProcess(MODULE, traced.arguments())
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def check(self) -> None:
        """Raises `ApiError` where there are no answers."""
        await self._asked(b"{}")

    async def answer(self, request: TraceRequest, model: ServedModel) -> bytes:
        """Returns the JSON body. Raises `ApiError`: 400 for a text over a limit, 409 for an index
        of other data, 429 if too many wait, 503 without an answer."""
        if request.tokens is not None:
            model.checked_ids(request.tokens, param="tokens")
        question = request.model_dump(exclude={"model"})
        body = await self._asked(orjson.dumps(question))
        about = {"object": "trace", "model": model.name, "version": model.version}
        return orjson.dumps(about)[:-1] + b"," + body[1:]

    async def _asked(self, question: bytes) -> bytes:
        if self._num_waiting > MAX_WAITING:
            raise overloaded(
                f"The replica has {self._num_waiting} texts to trace; try again in a moment"
            )
        self._num_waiting += 1
        try:
            async with asyncio.timeout(TIMEOUT_S), self._turn:
                status, body = await self._process.ask(question)
        except TimeoutError:
            raise error_of("trace_unavailable", problem=f"it took over {TIMEOUT_S:.0f} s") from None
        except (ConnectionError, asyncio.IncompleteReadError):
            raise error_of("trace_unavailable", problem="its process has ended") from None
        finally:
            self._num_waiting -= 1
        if status == 200:
            return body
        problem = json.loads(body)
        match status:
            case 400:
                raise ApiError(problem["message"], param=problem["param"], code="invalid_value")
            case 409:
                raise error_of("trace_other_data", problem=problem["message"])
            case _:
                raise error_of("trace_unavailable", problem=problem["message"])

    def close(self) -> None:
        self._process.close()
