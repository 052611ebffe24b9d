"""The routes that ask the model answer as FastAPI's do: for bugs, and by other methods."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.serving.endpoint_parts import loopback_server, replica_app

ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def test_a_bug_is_told_in_the_shape_of_errors_and_logged_whole(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with (
            replica_app(checkpoint, name="tiny") as (app, versions),
            loopback_server(app) as url,
            httpx.AsyncClient(base_url=url, timeout=None) as http,
        ):
            other = await http.get("/v1/completions")
            assert (other.status_code, other.headers["allow"]) == (405, "POST")
            engine = versions.live.engine
            number_of, engine.next_seq_id = engine.next_seq_id, lambda: 1 // 0  # type: ignore[method-assign]
            answer = await http.post("/v1/completions", json=ASKED)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
            assert answer.headers["x-model-version"] == versions.live.model.version
            engine.next_seq_id = number_of  # type: ignore[method-assign]
            assert (await http.post("/v1/completions", json=ASKED)).status_code == 200

    asyncio.run(scenario())
    assert "ZeroDivisionError" in capsys.readouterr().err
