"""Receipts of answers: signed, about this request and this whole answer alone, the same again in
company, and at another endpoint."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.cli import main
from cluster.endpoint.endpoint import Endpoint
from cluster.endpoint.receipt import differing_fields, verified, weights_told
from cluster.settings.serve import ServeConfig
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from serving.delivery.versions import Versions
from tests.model.signing.receipt_forgeries import RECEIPT_FORGERIES, RECEIPT_REWRITINGS, edited
from tests.serving.endpoint_parts import Run, loopback_server, replica_app, shared_replica
from tests.serving.tiny_models import lively_model, write_model
from tests.signing_keys import made_keys

pytestmark = pytest.mark.more

ASKED: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the quick",
    "max_tokens": 12,
    "seed": 3,
    "ignore_eos": True,
    "raymill": {"receipt": True},
}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick"}],
    "max_tokens": 6,
    "temperature": 0,
    "raymill": {"receipt": True},
}
RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": "the quick",
    "max_output_tokens": 6,
    "temperature": 0,
    "raymill": {"receipt": True},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made_keys(tmp_path_factory.mktemp("keys"), "endpoint")


@pytest.fixture(scope="module")
def run(checkpoint: Path, keys: tuple[Path, Path]) -> Iterator[Run]:
    with shared_replica(checkpoint, config=ServeConfig(receipt_key_file=str(keys[0]))) as run:
        yield run


@pytest.fixture
def files(run: Run, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Asks, and returns the files with the request and the answer."""

    def asked(route: str, body: dict[str, Any]) -> tuple[Path, Path]:
        places = tmp_path / "request.json", tmp_path / "answer.json"

        async def ask(http: httpx.AsyncClient, _: Versions) -> None:
            answer = await http.post(route, json=body)
            assert answer.status_code == 200, answer.text
            places[1].write_bytes(answer.content)

        run(ask)
        places[0].write_text(json.dumps(body))
        return places

    return asked


@pytest.mark.parametrize(
    ("route", "body"),
    [("/v1/completions", ASKED), ("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSE)],
)
def test_an_answer_has_a_receipt_that_its_key_checks(
    files: Callable[..., tuple[Path, Path]],
    keys: tuple[Path, Path],
    checkpoint: Path,
    route: str,
    body: dict[str, Any],
) -> None:
    verdict = verified(*files(route, body), keys[1], None)
    assert verdict["valid"]
    recorded = json.loads((checkpoint / "raymill.json").read_bytes())
    assert verdict["receipt"]["weights"]["sha256"] == recorded["parameter_hash"]


# By forgery; the others are refused because the receipt is about another request or answer
REFUSALS = {
    "model of the request": r"it asks for gpt-5, and tiny-run answered",
    "model of the answer": r"the model gpt-5 gave it, and its receipt says tiny-run",
    "words beside the receipt": r"answer.json: its field raymill has note beside the receipt",
    "receipt left out": r"answer.json has no receipt: ask with",
    "receipt by another key": r"signed with another key",
    "payload of the receipt": r"was altered, or not signed with the key",
    "request with the same prompt twice": r"request.json: .*the key prompt occurs twice",
    "request with another prompt first": r"request.json: .*the key prompt occurs twice",
    "answer with other choices first": r"answer.json: .*the key choices occurs twice",
    "choice with another text first": r"answer.json: .*the key text occurs twice",
    "NaN in the answer": r"answer.json: .*strict JSON.*expected a JSON value",
    "infinity in the request": r"request.json: .*strict JSON.*expected a JSON value",
}


@pytest.mark.parametrize("name", RECEIPT_FORGERIES)
def test_a_forgery_is_refused_where_the_honest_answer_is_not(
    files: Callable[..., tuple[Path, Path]], keys: tuple[Path, Path], name: str
) -> None:
    request, answer = files("/v1/completions", ASKED)
    assert verified(request, answer, keys[1], None)["valid"]
    assert RECEIPT_FORGERIES.keys() >= REFUSALS.keys()
    texts = edited(RECEIPT_FORGERIES[name], ASKED, json.loads(answer.read_bytes()))
    for file, text in zip((request, answer), texts, strict=True):
        file.write_text(text)
    with pytest.raises(UserError, match=REFUSALS.get(name, "about another (request|answer)")):
        verified(request, answer, keys[1], None)


@pytest.mark.parametrize("name", RECEIPT_REWRITINGS)
def test_what_is_the_same_in_other_words_is_accepted(
    files: Callable[..., tuple[Path, Path]], keys: tuple[Path, Path], name: str
) -> None:
    request, answer = files("/v1/completions", ASKED)
    texts = edited(RECEIPT_REWRITINGS[name], ASKED, json.loads(answer.read_bytes()))
    for file, text in zip((request, answer), texts, strict=True):
        file.write_text(text)
    verdict = verified(request, answer, keys[1], None)
    assert verdict["valid"] and "from tiny-run, asked for as tiny at" in verdict["verdict"]


def test_a_file_that_is_missing_or_no_object_is_named(
    files: Callable[..., tuple[Path, Path]], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    _, answer = files("/v1/completions", ASKED)
    with pytest.raises(UserError, match=r"none.json: expected .*No such file"):
        verified(tmp_path / "none.json", answer, keys[1], None)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"list.json: expected an object"):
        verified(tmp_path / "list.json", answer, keys[1], None)


def test_the_same_request_in_company_has_the_same_answer_hash(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        alone = (await http.post("/v1/completions", json=ASKED)).json()
        others = [ASKED | {"seed": seed, "prompt": "x" * seed} for seed in range(4, 12)]
        together = await asyncio.gather(
            *(http.post("/v1/completions", json=body) for body in (*others, ASKED))
        )
        assert together[-1].json()["choices"] == alone["choices"]

    run(check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, "set seed, or temperature to 0"),
        ({"stream": True}, "only without stream=true"),
        ({"raymill": {"receipts": True}}, "raymill.receipts is not supported"),
    ],
)
def test_what_could_not_be_checked_gets_no_receipt(
    run: Run, change: dict[str, Any], message: str
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/completions", json=ASKED | change)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]

    run(check)


def test_an_endpoint_without_a_key_says_so(checkpoint: Path) -> None:
    with shared_replica(checkpoint, config=ServeConfig()) as run:

        async def check(http: httpx.AsyncClient, _: Versions) -> None:
            answer = await http.post("/v1/completions", json=ASKED)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_receipts")
            plain = {name: value for name, value in ASKED.items() if name != "raymill"}
            assert "raymill" not in (await http.post("/v1/completions", json=plain)).json()

        run(check)


def test_the_command_asks_an_endpoint_for_the_same_again(
    files: Callable[..., tuple[Path, Path]],
    keys: tuple[Path, Path],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request, answer = files("/v1/completions", ASKED)
    told = [str(request), str(answer), "--signed-by", str(keys[1])]
    assert main(["verify-answer", *told]) == 0
    assert "signed: this request to the weights" in capsys.readouterr().out

    assert main(["verify-answer", *told, "--url", "http://127.0.0.1:1"]) == 1
    assert "no endpoint answers at http://127.0.0.1:1" in capsys.readouterr().err
    verdict = asked_again(request, answer, keys[1], checkpoint)
    assert verdict["valid"], verdict["verdict"]
    assert verdict["verdict"].endswith("has the same weights and answers the same")
    assert verdict["weights"] == verdict["receipt"]["weights"]["sha256"]


Wrap = Callable[[ASGIApp], ASGIApp]


def asked_again(
    request: Path, answer: Path, public_key: Path, folder: Path, *, wrap: Wrap = lambda app: app
) -> dict[str, Any]:
    """Asks another endpoint, which serves the checkpoint in the folder."""

    async def ask() -> dict[str, Any]:
        async with (
            replica_app(folder, name="tiny") as (app, _),
            loopback_server(wrap(app)) as url,
        ):
            endpoint = Endpoint(url, "", None)
            return await asyncio.to_thread(verified, request, answer, public_key, endpoint)

    return asyncio.run(ask())


def test_an_endpoint_with_other_weights_does_not_confirm(
    files: Callable[..., tuple[Path, Path]],
    keys: tuple[Path, Path],
    checkpoint: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    request, answer = files("/v1/completions", ASKED)
    assert asked_again(request, answer, keys[1], checkpoint)["valid"]
    other = write_model(tmp_path / "other", lively_model(tokenizer, seed=2), tokenizer)
    verdict = asked_again(request, answer, keys[1], other)
    weights = json.loads((other / "raymill.json").read_bytes())["parameter_hash"]
    assert not verdict["valid"] and verdict["weights"] == weights
    assert f"has other weights ({weights[:12]}…) and answers otherwise in" in verdict["verdict"]


def answering(path: str, change: Callable[[dict[str, Any]], None]) -> Wrap:
    """The same endpoint, with a change of what it answers on one path."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def changed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != path:
                await app(scope, receive, send)
                return
            headers = dict(scope["headers"])
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
                content = await Request(scope, receive).body()
                got = await http.request(
                    scope["method"],
                    f"http://test{path}",
                    content=content,
                    headers={"content-type": headers.get(b"content-type", b"").decode()},
                )
            fields = got.json()
            change(fields)
            await JSONResponse(fields, got.status_code)(scope, receive, send)

        return changed

    return wrap


def without_lineage(models: dict[str, Any]) -> None:
    """As another endpoint with OpenAI's API lists its models."""
    shown = ("id", "object", "created", "owned_by")
    models["data"] = [{name: card[name] for name in shown} for card in models["data"]]


def with_other_weights(models: dict[str, Any]) -> None:
    for card in models["data"]:
        card["lineage"]["parameter_hash"] = "0" * 64


def with_more_usage(answer: dict[str, Any]) -> None:
    answer["usage"]["prompt_tokens"] += 1


def with_another_model(answer: dict[str, Any]) -> None:
    answer["model"] = "theirs"


def with_all_that_differs(answer: dict[str, Any]) -> None:
    answer |= {"id": "x", "created": 1}
    answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 999}


@pytest.mark.parametrize(
    ("path", "change", "is_valid", "words"),
    [
        ("/v1/models", without_lineage, True, "does not tell its weights and answers the same"),
        ("/v1/models", with_other_weights, False, r"other weights \(0{12}…\) and answers the same"),
        ("/v1/completions", with_more_usage, False, "weights and answers otherwise in usage"),
        ("/v1/completions", with_another_model, False, "weights and answers otherwise in model"),
        ("/v1/completions", with_all_that_differs, True, "same weights and answers the same$"),
    ],
)
def test_what_an_endpoint_answers_again_is_compared(
    files: Callable[..., tuple[Path, Path]],
    keys: tuple[Path, Path],
    checkpoint: Path,
    path: str,
    change: Callable[[dict[str, Any]], None],
    is_valid: bool,
    words: str,
) -> None:
    request, answer = files("/v1/completions", ASKED)
    verdict = asked_again(request, answer, keys[1], checkpoint, wrap=answering(path, change))
    assert verdict["valid"] is is_valid
    assert re.search(words, verdict["verdict"]), verdict["verdict"]


def test_a_response_is_the_same_again_but_for_its_ids_and_times(
    files: Callable[..., tuple[Path, Path]], keys: tuple[Path, Path], checkpoint: Path
) -> None:
    request, answer = files("/v1/responses", RESPONSE)
    verdict = asked_again(request, answer, keys[1], checkpoint)
    assert verdict["valid"] and verdict["verdict"].endswith("weights and answers the same")
    first = json.loads(answer.read_bytes())
    [message] = first["output"]
    other = first | {"output": [message | {"content": [{"type": "output_text", "text": "x"}]}]}
    assert differing_fields(first, other) == ["output"]


def test_the_ids_of_calls_are_not_compared_and_their_arguments_are() -> None:
    def called(call_id: str, city: str) -> dict[str, Any]:
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        calls = [{"id": call_id, "type": "function", "function": function}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"model": "tiny", "choices": [{"index": 0, "message": message}]}

    assert differing_fields(called("call_1", "Wien"), called("call_2", "Wien")) == []
    assert differing_fields(called("call_1", "Wien"), called("call_1", "Linz")) == ["choices"]


def test_the_weights_are_those_of_the_version_that_answered() -> None:
    """An endpoint with a promotion under way, and an adapter whose weights transformers saved."""
    live, candidate = (
        {"version": letter * 16, "lineage": {"parameter_hash": letter * 64}} for letter in "ab"
    )
    delivery = {"phase": "canary", "live": live, "candidate": candidate, "previous": None}
    adapter = {"id": "adapter", "version": "c" * 16, "lineage": None}
    cards = [{"id": "mine", **live, "delivery": delivery}, adapter]
    assert weights_told(cards, "a" * 16) == "a" * 64
    assert weights_told(cards, "b" * 16) == "b" * 64
    assert weights_told(cards, "c" * 16) == "c" * 16
    assert weights_told(cards, "d" * 16) is None
