"""Receipts of answers by themselves: what two hashes have in common, and whose receipts count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.signing.receipt import (
    RECEIPT_TYPE,
    SUBJECT,
    checked,
    hash_of_answer,
    hash_of_request,
)
from model.signing.signature import SigningKey, StatementSigner
from raymill.errors import UserError
from tests.signing_keys import made_keys

REQUEST: dict[str, Any] = {"model": "mine", "prompt": "To be", "temperature": 0}
ANSWER: dict[str, Any] = {"model": "mine", "choices": [{"text": " or not"}]}

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Signs a receipt of the type, and checks it."""

    def signed(kind: str = RECEIPT_TYPE, **predicate: Any) -> dict[str, Any]:
        key, public_key = made_keys(tmp_path, "endpoint")
        said = {"request": {"sha256": hash_of_request(REQUEST)}, "model": "mine"} | predicate
        bundle = StatementSigner(SigningKey(key)).signed(
            kind, subject=SUBJECT, sha256=hash_of_answer(ANSWER), predicate=said
        )
        (tmp_path / "receipt.sig").write_text(json.dumps(bundle))
        return checked(REQUEST, ANSWER, tmp_path / "receipt.sig", public_key)

    return signed


def test_a_receipt_says_what_was_signed(check: Check) -> None:
    assert check(time="now")["time"] == "now"


def test_a_receipt_of_an_earlier_version_is_refused_and_says_what_to_do(check: Check) -> None:
    with pytest.raises(UserError, match=r"earlier version and covers only the choices.* ask again"):
        check("urn:raymill:answer:v1")


def test_a_statement_about_a_training_is_no_receipt(check: Check) -> None:
    with pytest.raises(UserError, match="urn:raymill:training:v1 is no receipt"):
        check("urn:raymill:training:v1")


def test_a_signed_receipt_of_another_model_is_refused_and_names_both(check: Check) -> None:
    with pytest.raises(UserError, match="the model mine gave it, and its receipt says theirs"):
        check(model="theirs")


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (0, 0.0),
        (-3, -3.0),
        (2**53 - 1, float(2**53 - 1)),
        ([{"a": 1}], [{"a": 1.0}]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ],
)
def test_equal_numbers_have_one_hash(value: Any, other: Any) -> None:
    assert hash_of_request({"x": value}) == hash_of_request({"x": other})


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (0, 0.5),
        (1, True),
        (1, "1"),
        (0, None),
        (0, False),
        # A double is these two whole numbers, so its hash is that of neither
        (2**53, float(2**53)),
        (2**53 + 1, float(2**53 + 1)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {}),
    ],
)
def test_other_values_have_another_hash(value: Any, other: Any) -> None:
    assert hash_of_request({"x": value}) != hash_of_request({"x": other})


def test_hashes_leave_out_the_field_of_the_receipt_alone() -> None:
    assert hash_of_answer(ANSWER | {"raymill": {"receipt": {}}}) == hash_of_answer(ANSWER)
    assert hash_of_answer(ANSWER | {"raymil": {}}) != hash_of_answer(ANSWER)
    inner = {"choices": [{"text": " or not", "raymill": 1}]}
    assert hash_of_answer(ANSWER | inner) != hash_of_answer(ANSWER)


def test_what_is_no_json_has_no_hash() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_of_answer({"x": float("nan")})
