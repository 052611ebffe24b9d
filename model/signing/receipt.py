"""Defines the receipt of an answer: a signed Statement that names the request, the weights, the
engine and the whole answer by their hashes. The same request to the same weights has the same
answer again, so anybody who has both can check it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from model.signing.signature import signed_statement
from raymill.errors import UserError

FIELD = "raymill"
"""The field of requests that asks for a receipt, and of answers that has it."""
RECEIPT_TYPE = "urn:raymill:answer:v2"
"""The type of the Statement's predicate."""
SUBJECT = "answer"
"""The Statement's subject, by name."""
PORTABLE, OF_THE_PROCESSOR = "portable", "of the processor"
"""Whose bits an answer has: every processor's, or those of this kind of processor."""
_TYPE_OF_CHOICES = "urn:raymill:answer:v1"  # of an earlier version
_EXACT_BELOW = 2**53  # a double is exact to the unit


def hash_of_request(request: dict[str, Any]) -> str:
    """Returns the SHA-256 of a request, but for the field `raymill`: it asks for what comes beside
    an answer, and changes none."""
    return _hash_without_field(request)


def hash_of_answer(answer: dict[str, Any]) -> str:
    """Returns the SHA-256 of a whole answer, but for the field `raymill`, which has the receipt."""
    return _hash_without_field(answer)


def _hash_without_field(body: dict[str, Any]) -> str:
    """Returns the same hash whatever the order of fields, the blanks, and whether a whole number is
    written as 2 or 2.0."""
    content = _canonical({name: value for name, value in body.items() if name != FIELD})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    match value:
        case dict():
            return {name: _canonical(part) for name, part in value.items()}
        case list():
            return [_canonical(part) for part in value]
        case float() if value.is_integer() and abs(value) < _EXACT_BELOW:
            return int(value)
    return value


def checked(
    request: dict[str, Any], answer: dict[str, Any], bundle: Path, public_key: Path
) -> dict[str, Any]:
    """Returns what the receipt in the file `bundle` says, once it is signed with the key, and about
    this request and this answer. Raises `UserError`."""
    statement = signed_statement(bundle, public_key)
    kind = statement.get("predicateType")
    if kind == _TYPE_OF_CHOICES:
        raise UserError(
            "the receipt is of an earlier version and covers only the choices of its answer: ask "
            "again, for a receipt of the whole answer"
        )
    if kind != RECEIPT_TYPE:
        raise UserError(f"a Statement of the type {kind} is no receipt: expected {RECEIPT_TYPE}")
    receipt: dict[str, Any] = statement["predicate"]
    model, answering, asked = receipt["model"], answer.get("model"), request.get("model")
    if answering != model:
        raise UserError(
            f"the answer says that the model {answering} gave it, and its receipt says {model}: "
            "expected the answer as it was received"
        )
    if receipt["request"]["sha256"] != hash_of_request(request):
        names = "" if asked in (None, model) else f" (it asks for {asked}, and {model} answered)"
        raise UserError(
            f"the receipt is about another request{names}: a field was changed, added or left out; "
            "expected the request as it was sent"
        )
    subjects = [subject["digest"]["sha256"] for subject in statement["subject"]]
    if subjects != [hash_of_answer(answer)]:
        raise UserError(
            "the receipt is about another answer: a field was changed, added or left out; "
            "expected the answer as it was received"
        )
    return receipt
