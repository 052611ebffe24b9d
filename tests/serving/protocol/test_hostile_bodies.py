"""Hostile bodies that need no model to be refused, each with its right answer. An endpoint gets ten
of them (endpoint/test_hostile.py), which shows that it answers what the protocol says."""

import pytest

from serving.api.chat import ChatRequest
from serving.protocol.errors import ApiError
from serving.protocol.protocol import (
    CompletionRequest,
    EmbeddingRequest,
    Request,
    parse_request,
)
from tests.serving.hostile_requests import (
    BODIES,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    NEEDS_THE_MODEL,
    TEN_OF_THE_PROTOCOL,
    Hostile,
)

OF_ROUTE: dict[str, type[Request]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatRequest,
    EMBEDDINGS: EmbeddingRequest,
}
REFUSED = [case for case in BODIES if case.name not in NEEDS_THE_MODEL]
LEFT = [case for case in BODIES if case.name in NEEDS_THE_MODEL]


def named(case: Hostile) -> str:
    return f"{case.number} {case.name}"


def parsed(case: Hostile) -> Request:
    body = case.body() if callable(case.body) else case.body
    return parse_request(body, OF_ROUTE[case.route])


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_a_body__is_refused_with_its_status_code_and_field(case: Hostile) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(case)
    error = caught.value
    assert error.status == case.status
    assert case.code in (None, error.code)
    assert error.param == case.param
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("case", LEFT, ids=named)
def test_a_body_that_needs_the_model__is_left_to_a_replica(case: Hostile) -> None:
    assert parsed(case) is not None


def test_ten_of_them_reach_an_endpoint() -> None:
    sent = [case for case in REFUSED if case.name in TEN_OF_THE_PROTOCOL]
    assert len(REFUSED) > 100 and len(sent) == len(TEN_OF_THE_PROTOCOL) == 10
    assert {case.route for case in sent} == OF_ROUTE.keys()
