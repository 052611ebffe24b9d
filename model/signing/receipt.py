"""Defines the receipt of an answer: a signed Statement that names the request, the weights, the
engine and the answer by their hashes. The same request to the same weights has the same answer
again, so whoever has both can check it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.signing.signature import stated

FIELD = "raymill"
"""The field of requests that asks for a receipt, and of answers that has it."""
RECEIPT_TYPE = "urn:raymill:answer:v1"
"""The type of the Statement's predicate."""


def hash_of(value: Any) -> str:
    """Returns the SHA-256 of a value of JSON, whatever the order of its fields and its blanks."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_of_request(body: dict[str, Any]) -> str:
    """Returns the hash of a request, but for what asks for the receipt."""
    return hash_of({name: value for name, value in body.items() if name != FIELD})


def checked(
    request: dict[str, Any], answer: dict[str, Any], bundle: Path, public_key: Path
) -> dict[str, Any]:
    """Returns what the receipt in the file `bundle` says, once it is signed with the key, and about
    this request and this answer. Raises `UserError`."""
    said = stated(bundle, public_key, kind=RECEIPT_TYPE, sha256=hash_of(answer["choices"]))
    if said["request"]["sha256"] != hash_of_request(request):
        raise UserError("the receipt is about another request: a field of it was changed")
    return said
