"""Receipts of answers: signed, about this request and this answer alone, and the same again in
company."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.cli import main
from cluster.endpoint.endpoint import Endpoint
from cluster.endpoint.receipt import verified
from cluster.settings.serve import ServeConfig
from model.errors import UserError
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, loopback_server, replica_app, shared_replica
from tests.signing_keys import made_keys

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
    ("route", "body"), [("/v1/completions", ASKED), ("/v1/chat/completions", CHAT)]
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


def test_whatever_is_changed_is_found(
    files: Callable[..., tuple[Path, Path]], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    request, answer = files("/v1/completions", ASKED)
    with pytest.raises(UserError, match="another key"):
        verified(request, answer, made_keys(tmp_path, "other")[1], None)
    changed = json.loads(answer.read_bytes())
    changed["choices"][0]["text"] += "!"
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="about something else"):
        verified(request, tmp_path / "changed.json", keys[1], None)
    request.write_text(json.dumps(ASKED | {"seed": 4}))
    with pytest.raises(UserError, match="about another request"):
        verified(request, answer, keys[1], None)
    answer.write_text(json.dumps({"choices": []}))
    with pytest.raises(UserError, match="has no receipt: ask with"):
        verified(request, answer, keys[1], None)


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
        ({"stream": True}, "without stream=true only"),
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

    async def asked_again() -> dict[str, Any]:
        async with (
            replica_app(checkpoint, name="tiny") as (app, _),
            loopback_server(app) as url,
        ):
            endpoint = Endpoint(url, "", None)
            return await asyncio.to_thread(verified, request, answer, keys[1], endpoint)

    assert main(["verify-answer", *told, "--url", "http://127.0.0.1:1"]) == 1
    assert "no endpoint answers at http://127.0.0.1:1" in capsys.readouterr().err
    verdict = asyncio.run(asked_again())
    assert verdict["valid"]
    assert verdict["verdict"].endswith("answers the same")
