"""Pages of other origins: those that `http.cors_origins` names may use the endpoint in a real
Chromium, others may not."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.serve import EngineConfig, HttpConfig, ServeConfig
from tests.chromium import needs_chromium, running_chromium
from tests.serving.endpoint_parts import Endpoints
from tests.serving.hostile_requests import MODEL
from tests.time_limits import limit_s

KEY = "sk-cross-origin"
pytestmark = pytest.mark.cluster

# What a web application does: it lists the models, streams a completion, asks for embeddings, and
# reads refusals.
APPLICATION = """async ([url, key, model]) => {
  const ask = async (path, body, more = {}) => {
    const headers = {"Content-Type": "application/json", "Authorization": `Bearer ${key}`, "X-Stainless-Lang": "js"};
    const method = body ? "POST" : "GET";
    return fetch(url + path, {method, headers: {...headers, ...more}, body: body && JSON.stringify(body)});
  };
  const models = await ask("/v1/models");
  const completion = {model, prompt: "the quick", max_tokens: 9, temperature: 0};
  const streamed = await ask("/v1/completions", {...completion, stream: true});
  const reader = streamed.body.pipeThrough(new TextDecoderStream()).getReader();
  let events = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) events += part.value;
  const embeddings = await ask("/v1/embeddings", {model, input: ["the quick", "fox"]});
  const stranger = await ask("/v1/models", null, {"Authorization": "Bearer sk-wrong"});
  const large = await ask("/v1/completions", {...completion, prompt: "x".repeat(2 << 20)});
  return {
    models: (await models.json()).data.map((card) => card.id),
    headers: ["x-request-id", "x-model-version"].map((name) => streamed.headers.get(name)),
    events,
    whole: await (await ask("/v1/completions", completion)).json(),
    numVectors: (await embeddings.json()).data.length,
    refusals: [[stranger.status, (await stranger.json()).error.code], [large.status, (await large.json()).error.code]],
  };
}"""


class Page(BaseHTTPRequestHandler):
    """A web page of another origin."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def origins() -> Iterator[list[str]]:
    """Two, of which the endpoint names the first."""
    servers = [HTTPServer(("127.0.0.1", 0), Page) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def url(
    endpoints: Endpoints,
    run_checkpoint: Path,
    origins: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    config = ServeConfig(
        checkpoint=str(run_checkpoint),
        model_name=MODEL,
        api_key_file=str(keys),
        http=HttpConfig(cors_origins=[origins[0]]),
        engine=EngineConfig(max_num_seqs=8),
    )
    return str(endpoints.deployed(config)["url"])


def preflight(url: str, origin: str, path: str = "/v1/completions") -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return httpx.options(f"{url}{path}", headers=asked, timeout=limit_s(30))


def test_what_a_browser_asks_beforehand_needs_no_key(url: str, origins: list[str]) -> None:
    answer = preflight(url, origins[0])
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origins[0]
    allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    assert {"authorization", "content-type", "x-stainless-lang"} <= set(allowed)
    assert answer.headers["access-control-allow-methods"] == "GET, POST"
    assert "access-control-allow-credentials" not in answer.headers
    for origin in (origins[1], "null", f"{origins[0]}.example.com"):
        refused = preflight(url, origin)
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_a_key_is_needed_all_the_same(url: str, origins: list[str]) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"Origin": origins[0]}, timeout=limit_s(30))
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == origins[0]
    plain = httpx.get(
        f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=limit_s(30)
    )
    assert plain.status_code == 200 and not [
        name for name in plain.headers if name.startswith("access-control-allow")
    ]


@needs_chromium
def test_an_application_of_a_named_origin_works_and_any_other_does_not(
    url: str, origins: list[str]
) -> None:
    with running_chromium() as browser:
        page = browser.new_page()
        page.goto(origins[0])
        found = page.evaluate(APPLICATION, [url, KEY, MODEL])
        page.goto(origins[1])
        failure = page.evaluate(
            f"fetch('{url}/health').then(() => 'it could read', (error) => error.message)"
        )
    assert found["models"] == [MODEL] and found["numVectors"] == 2
    assert all(found["headers"])
    *parts, done = found["events"].strip().split("\n\n")
    assert done == "data: [DONE]" and len(parts) >= found["whole"]["usage"]["completion_tokens"]
    assert found["refusals"] == [[401, "invalid_api_key"], [413, "body_too_large"]]
    assert failure == "Failed to fetch"
