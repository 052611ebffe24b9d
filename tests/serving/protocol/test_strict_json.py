"""Bodies that would take long to parse are refused before they are parsed."""

import json

import pytest

from model.files.strict_json import MAX_DEPTH
from serving.protocol import strict_json
from serving.protocol.errors import ApiError
from serving.protocol.strict_json import MAX_CONTAINERS, parse_json_object


@pytest.mark.parametrize("part", ["[]", "{}", '{"":[]}', '[["]"]]'])
def test_a_broad_body_is_refused_before_it_is_parsed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the old code a megabyte of it held Python's lock for half a second."""
    body = ('{"x":[' + ",".join([part] * MAX_CONTAINERS) + "]}").encode()

    def parse(_: bytes) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(strict_json, "strict_json", parse)
    with pytest.raises(ApiError, match="lists and objects") as refused:
        parse_json_object(body)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(
    "text", ["[{" * MAX_CONTAINERS, '\\"[\\' * MAX_CONTAINERS, "[\n]" * MAX_CONTAINERS]
)
def test_brackets_in_a_text_do_not_count(text: str) -> None:
    body = json.dumps({"prompt": text, "stop": ["[", '"{']}).encode()
    assert parse_json_object(body)["prompt"] == text


def test_as_many_as_are_allowed_are_read() -> None:
    body = {"x": [[]] * (MAX_CONTAINERS - 2)}
    assert parse_json_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize("more", [0, 1])
def test_lists_beside_numbers_count_for_the_depth(more: int) -> None:
    lists = "[" * (MAX_DEPTH - 2 + more) + "]" * (MAX_DEPTH - 2 + more)
    body = f'{{"x":[1,{lists}]}}'.encode()
    if not more:
        assert parse_json_object(body)["x"][0] == 1
        return
    with pytest.raises(ApiError, match="nested too deeply"):
        parse_json_object(body)
