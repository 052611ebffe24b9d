"""Checks the receipt of an answer, and asks an endpoint for the same answer again."""

import json
import tempfile
from pathlib import Path
from typing import Any

from cluster.endpoint.endpoint import Endpoint, raise_for
from model.errors import UserError
from model.signing.receipt import FIELD, checked, hash_of

_ROUTES = {"text_completion": "/v1/completions", "chat.completion": "/v1/chat/completions"}


def verified(
    request_file: Path, answer_file: Path, public_key: Path, endpoint: Endpoint | None
) -> dict[str, Any]:
    """Returns `valid`, a `verdict`, and what the receipt says; `endpoint` is asked the same, if it
    is given. Raises `UserError` for files that are no request and answer with a receipt."""
    request, answer = _read(request_file), _read(answer_file)
    if "receipt" not in (answer.get(FIELD) or {}) or "choices" not in answer:
        raise UserError(
            f'{answer_file} has no receipt: ask with {{"{FIELD}": {{"receipt": true}}}} in the request'
        )
    with tempfile.TemporaryDirectory(prefix="raymill-receipt-") as scratch:
        bundle = Path(scratch) / "receipt.sig"
        bundle.write_text(json.dumps(answer[FIELD]["receipt"]))
        said = checked(request, answer, bundle, public_key)
    weights = said["weights"]["sha256"]
    verdict = (
        f"signed: this request to the weights {weights[:12]}… got this answer at {said['time']}"
    )
    if endpoint is None:
        return {"verdict": verdict, "valid": True, "receipt": said}
    again = _asked_again(endpoint, request, str(answer.get("object")))
    is_same = hash_of(again["choices"]) == hash_of(answer["choices"])
    here = str(again.get("system_fingerprint"))
    found = "answers the same" if is_same else f"answers otherwise (its version is {here})"
    return {
        "verdict": f"{verdict}; {endpoint.url} {found}",
        "valid": is_same,
        "receipt": said,
        "system_fingerprint": here,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected a file with an object of JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object of JSON")
    return found


def _asked_again(endpoint: Endpoint, request: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind not in _ROUTES:
        raise UserError(
            f"an answer of the kind {kind!r} has no receipt; expected {', '.join(_ROUTES)}"
        )
    body = {name: value for name, value in request.items() if name != FIELD}
    with endpoint.client(timeout_s=600) as client:
        response = client.post(_ROUTES[kind], json=body)
        raise_for(response)
        again: dict[str, Any] = response.json()
    return again
