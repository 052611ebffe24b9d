"""What somebody may do to a request and its answer while a receipt is in the answer, and what
changes neither."""

import base64
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.signing.receipt import FIELD
from model.signing.signature import SigningKey, StatementSigner
from tests.signing_keys import made_keys

Fields = dict[str, Any]
Texts = tuple[str, str]
Edit = Callable[[Fields, Fields], Texts | None]
"""Changes a request and its answer in place, or returns the texts of both."""


def edited(edit: Edit, request: Fields, answer: Fields) -> Texts:
    """Returns the texts of the request and of the answer, as the edit leaves them. Both stay as
    they are."""
    request, answer = copy.deepcopy(request), copy.deepcopy(answer)
    texts = edit(request, answer)
    return texts or (json.dumps(request), json.dumps(answer))


def untouched(_request: Fields, _answer: Fields) -> None:
    """Leaves both as they are."""


def _in_request(**fields: Any) -> Edit:
    return lambda request, _answer: request.update(fields)


def _in_answer(**fields: Any) -> Edit:
    return lambda _request, answer: answer.update(fields)


def _in_choice(**fields: Any) -> Edit:
    return lambda _request, answer: answer["choices"][0].update(fields)


def _without_max_tokens(request: Fields, _answer: Fields) -> None:
    del request["max_tokens"]


def _with_usage_times_1000(_request: Fields, answer: Fields) -> None:
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    answer["usage"] |= {name: 1000 * answer["usage"][name] for name in counts}


def _without_usage(_request: Fields, answer: Fields) -> None:
    del answer["usage"]


def _with_words_beside_the_receipt(_request: Fields, answer: Fields) -> None:
    answer[FIELD]["note"] = "signed by the operator"


def _without_receipt(_request: Fields, answer: Fields) -> None:
    del answer[FIELD]


def _payload(answer: Fields) -> Fields:
    statement: Fields = json.loads(
        base64.b64decode(answer[FIELD]["receipt"]["dsseEnvelope"]["payload"])
    )
    return statement


def _with_edited_payload(_request: Fields, answer: Fields) -> None:
    statement = _payload(answer)
    statement["predicate"]["model"] = answer["model"] = "gpt-5"
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    answer[FIELD]["receipt"]["dsseEnvelope"]["payload"] = payload


def _signed_by_another_key(_request: Fields, answer: Fields) -> None:
    statement = _payload(answer)
    [subject] = statement["subject"]
    with tempfile.TemporaryDirectory() as folder:
        key, _ = made_keys(Path(folder), "stranger")
        answer[FIELD]["receipt"] = StatementSigner(SigningKey(key)).signed(
            statement["predicateType"],
            subject=subject["name"],
            sha256=subject["digest"]["sha256"],
            predicate=statement["predicate"],
        )


def _with_the_prompt_twice(request: Fields, answer: Fields) -> Texts:
    again = json.dumps({"prompt": request["prompt"]})
    return f"{json.dumps(request)[:-1]}, {again[1:]}", json.dumps(answer)


def _with_another_prompt_first(request: Fields, answer: Fields) -> Texts:
    other = json.dumps({"prompt": "Something quite different"})
    return f"{other[:-1]}, {json.dumps(request)[1:]}", json.dumps(answer)


def _with_other_choices_first(request: Fields, answer: Fields) -> Texts:
    other = json.dumps({"choices": [answer["choices"][0] | {"text": "forged"}]})
    return json.dumps(request), f"{other[:-1]}, {json.dumps(answer)[1:]}"


def _with_another_text_first(request: Fields, answer: Fields) -> Texts:
    place, twice = '"choices": [{', '"choices": [{"text": "forged", '
    return json.dumps(request), json.dumps(answer).replace(place, twice, 1)


def _with_nan(request: Fields, answer: Fields) -> Texts:
    return json.dumps(request), json.dumps(answer | {"created": float("nan")})


def _with_infinity(request: Fields, answer: Fields) -> Texts:
    return json.dumps(request | {"seed": float("inf")}), json.dumps(answer)


RECEIPT_FORGERIES: dict[str, Edit] = {
    "text of the answer": _in_choice(text=" or nut"),
    "finish reason": _in_choice(finish_reason="forged"),
    "prompt": _in_request(prompt="To bee"),
    "seed": _in_request(seed=123_456),
    "field of the request left out": _without_max_tokens,
    "model of the request": _in_request(model="gpt-5"),
    "model of the answer": _in_answer(model="gpt-5"),
    "usage": _with_usage_times_1000,
    "usage left out": _without_usage,
    "id": _in_answer(id="x"),
    "created": _in_answer(created=99),
    "system fingerprint": _in_answer(system_fingerprint="other"),
    "field added to the answer": _in_answer(note="signed by the operator"),
    "words beside the receipt": _with_words_beside_the_receipt,
    "receipt left out": _without_receipt,
    "receipt by another key": _signed_by_another_key,
    "payload of the receipt": _with_edited_payload,
    "request with the same prompt twice": _with_the_prompt_twice,
    "request with another prompt first": _with_another_prompt_first,
    "answer with other choices first": _with_other_choices_first,
    "choice with another text first": _with_another_text_first,
    "NaN in the answer": _with_nan,
    "infinity in the request": _with_infinity,
}
"""By name, for a request of /v1/completions with `prompt` and `max_tokens` and its answer, which
has a receipt. Each has to be refused."""


def _with_whole_numbers_as_floats(request: Fields, _answer: Fields) -> None:
    request |= {name: float(value) for name, value in request.items() if type(value) is int}


def _written_otherwise(request: Fields, answer: Fields) -> Texts:
    return json.dumps(request, sort_keys=True, indent=4), json.dumps(answer, sort_keys=True)


RECEIPT_REWRITINGS: dict[str, Edit] = {
    "nothing": untouched,
    "0.0 for 0 in the request": _with_whole_numbers_as_floats,
    "order and blanks": _written_otherwise,
    "options of the request's receipt": _in_request(raymill={"receipt": True, "other": 1}),
    "request without its wish for a receipt": _in_request(raymill=None),
}
"""By name, what changes neither the request nor the answer. Each has to be accepted."""
