"""Checks the receipt of an answer, and asks an endpoint for the same answer again."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from cluster.endpoint.endpoint import Endpoint, raise_for
from model.files.strict_json import strict_json
from model.signing.receipt import FIELD, PORTABLE, checked
from raymill.errors import UserError

_ROUTES = {
    "text_completion": "/v1/completions",
    "chat.completion": "/v1/chat/completions",
    "response": "/v1/responses",
}
# They differ between two answers to the same request
_OF_ONE_ANSWER = ("id", "created", "created_at", "completed_at", "system_fingerprint", FIELD)
_OF_THE_CACHE = {"prompt_tokens_details": None, "input_tokens_details": None}

Fields = dict[str, Any]


def verified(
    request_file: Path, answer_file: Path, public_key: Path, endpoint: Endpoint | None
) -> Fields:
    """Returns `valid`, a `verdict`, and what the receipt says; `endpoint` is asked the same, if it
    is given. Raises `UserError` for files that are no request and answer with a receipt."""
    request, answer = _read(request_file), _read(answer_file)
    with tempfile.TemporaryDirectory(prefix="raymill-receipt-") as scratch:
        bundle = Path(scratch) / "receipt.sig"
        bundle.write_text(json.dumps(_receipt_in(answer, answer_file)))
        receipt = checked(request, answer, bundle, public_key)
    weights = receipt["weights"]["sha256"]
    asked, model = request.get("model"), receipt["model"]
    names = "" if asked == model else f" from {model}, asked for as {asked}"
    verdict = (
        f"signed: this request to the weights {weights[:12]}… got this answer{names} "
        f"at {receipt['time']}"
    )
    if endpoint is None:
        return {"verdict": verdict, "valid": True, "receipt": receipt}
    again, cards = _asked_again(endpoint, request, str(answer.get("object")))
    version = str(again.get("system_fingerprint"))
    told = weights_told(cards, version)
    differing = differing_fields(answer, again)
    compared = f"{_has_weights(told, weights)} and {_answers(differing, version)}"
    if differing and receipt["engine"].get("arithmetic") != PORTABLE:
        compared += "; the receipt is of arithmetic that another kind of processor rounds otherwise"
    return {
        "verdict": f"{verdict}; {endpoint.url} {compared}",
        "valid": told in (weights, None) and not differing,
        "receipt": receipt,
        "system_fingerprint": version,
        "weights": told,
    }


def differing_fields(answer: Fields, again: Fields) -> list[str]:
    """Returns the fields in which two answers to one request differ, but for what is of one answer
    alone: its name, its time, the ids of its calls, and how much of the prompt was remembered."""
    one, other = _repeatable(answer), _repeatable(again)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def weights_told(cards: Iterable[Fields], version: str) -> str | None:
    """Returns the SHA-256 of the weights of a version, as a receipt has it, by the entries under
    /v1/models; None where they do not tell."""
    for card in cards:
        versions = [card, *card.get("delivery", {}).values()]
        for loaded in versions:
            if isinstance(loaded, dict) and loaded.get("version") == version:
                recorded: str | None = (loaded.get("lineage") or {}).get("parameter_hash")
                return recorded or version
    return None


def _has_weights(told: str | None, weights: str) -> str:
    if told is None:
        return "does not tell its weights"
    return "has the same weights" if told == weights else f"has other weights ({told[:12]}…)"


def _answers(differing: list[str], version: str) -> str:
    if not differing:
        return "answers the same"
    return f"answers otherwise in {', '.join(differing)} (its version is {version})"


def _repeatable(answer: Fields) -> Fields:
    fields = {name: value for name, value in answer.items() if name not in _OF_ONE_ANSWER}
    if isinstance(usage := answer.get("usage"), dict):
        fields["usage"] = usage | _OF_THE_CACHE
    if "choices" in answer:
        fields["choices"] = [_without_call_ids(choice) for choice in answer["choices"]]
    else:
        fields["output"] = [item | {"id": None, "call_id": None} for item in answer["output"]]
    return fields


def _without_call_ids(choice: Fields) -> Fields:
    message = choice.get("message", {})
    if "tool_calls" not in message:
        return choice
    calls = [call | {"id": None} for call in message["tool_calls"]]
    return choice | {"message": message | {"tool_calls": calls}}


def _read(file: Path) -> Fields:
    try:
        content = strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: expected a file with an object of strict JSON, as it was sent or received "
            f"({error})"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object of JSON")
    return content


def _receipt_in(answer: Fields, file: Path) -> Any:
    """Returns the receipt. Raises `UserError` where it is missing or not alone in its field, which
    nothing signs."""
    field = answer.get(FIELD)
    is_answer = "choices" in answer or "output" in answer
    if not isinstance(field, dict) or "receipt" not in field or not is_answer:
        raise UserError(
            f'{file} has no receipt: ask with {{"{FIELD}": {{"receipt": true}}}} in the request'
        )
    if others := ", ".join(sorted(field.keys() - {"receipt"})):
        raise UserError(
            f"{file}: its field {FIELD} has {others} beside the receipt, which nobody signed: "
            "expected the answer as it was received"
        )
    return field["receipt"]


def _asked_again(endpoint: Endpoint, request: Fields, kind: str) -> tuple[Fields, list[Fields]]:
    """Returns an endpoint's answer, and its entries under /v1/models."""
    if kind not in _ROUTES:
        raise UserError(
            f"an answer of the kind {kind!r} has no receipt; expected {', '.join(_ROUTES)}"
        )
    body = {name: value for name, value in request.items() if name != FIELD}
    with endpoint.client(timeout_s=600) as client:
        response = client.post(_ROUTES[kind], json=body)
        raise_for(response)
        models = client.get("/v1/models")
        if models.status_code == httpx.codes.NOT_FOUND:
            return response.json(), []
        raise_for(models)
    return response.json(), models.json()["data"]
