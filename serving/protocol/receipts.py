"""Signs what was answered, for requests whose answers can be computed again."""

import asyncio
import json
import time
from pathlib import Path

import orjson

from cluster.settings.code_folders import code_version
from cluster.settings.serve import EngineConfig, ServeConfig
from model.signing.receipt import (
    FIELD,
    OF_THE_PROCESSOR,
    PORTABLE,
    RECEIPT_TYPE,
    SUBJECT,
    hash_of_answer,
    hash_of_request,
)
from model.signing.signature import SigningKey, StatementSigner
from serving.protocol.errors import ApiError, error_of
from serving.protocol.protocol import GenerationRequest
from serving.protocol.request_facts import timestamp
from serving.protocol.served_model import ServedModel


class Receipts:
    """The receipts of one endpoint; none where it has no key."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises `UserError` for a key that does not sign."""
        file = config.receipt_key_file
        self._signer = StatementSigner(SigningKey.at(Path(file))) if file else None
        self._engine = config.engine

    def require_possible(self, request: GenerationRequest) -> None:
        """Raises `ApiError` (400) where a request asks for a receipt that nobody could check."""
        if request.raymill is None or not request.raymill.receipt:
            return
        if self._signer is None:
            raise error_of("no_receipts")
        if self._engine.runs_vllm:
            raise error_of("receipt_by_backend")
        if request.stream:
            raise ApiError("A receipt is given only without stream=true", param=FIELD)
        if request.seed is None and request.temperature > 0:
            raise ApiError(
                "A receipt is given for answers that can be computed again: set seed, or temperature to 0",
                param=FIELD,
            )

    async def added(
        self, answer: bytes, asked: bytes, model: ServedModel, *, dtype: str, is_portable: bool
    ) -> bytes:
        """Returns the answer with a receipt; `asked` is the request's body. The other two say how
        the engine computed."""
        numbers = {"dtype": dtype, "arithmetic": PORTABLE if is_portable else OF_THE_PROCESSOR}
        return await asyncio.to_thread(self._added, answer, asked, model, numbers)

    def _added(
        self, answer: bytes, asked: bytes, model: ServedModel, numbers: dict[str, str]
    ) -> bytes:
        assert self._signer is not None, "see require_possible"
        fields = orjson.loads(answer)
        receipt = self._signer.signed(
            RECEIPT_TYPE,
            subject=SUBJECT,
            sha256=hash_of_answer(fields),
            predicate={
                "request": {"sha256": hash_of_request(json.loads(asked))},
                "weights": {"sha256": _weights_of(model)},
                "model": fields["model"],
                "engine": _engine(self._engine) | numbers,
                "time": timestamp(time.time()),
            },
        )
        return orjson.dumps(fields | {FIELD: {"receipt": receipt}})


def _weights_of(model: ServedModel) -> str:
    recorded = model.metadata.parameter_hash if model.metadata else None
    return recorded or model.version


def _engine(config: EngineConfig) -> dict[str, str]:
    return {"name": "raymill", "device": config.device, "code": code_version()}
